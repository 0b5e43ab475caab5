//! Limits what can be written to the log about a port: a guest that resets its driver in a loop, or a front-end that connects in
//! one, is worth some lines, and then one now and again that says how many more there were.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;
use vmm_sys_util::timerfd::TimerFd;

/// Lines in a period that are logged as they come.
const FIRST: u64 = 20;
/// In which lines are counted. It begins with a line.
const PERIOD: Duration = Duration::from_secs(30);

/// Which lines are logged; time is what it is told.
#[derive(Default)]
struct Limit {
    /// When the period began, if one has.
    begun: Option<Instant>,
    /// Lines in it so far.
    lines: u64,
    /// Those of them that were left out, and the last one.
    left_out: u64,
    last: String,
    /// The period before had too many lines: those of this one are left to the sum.
    is_storm: bool,
}

impl Limit {
    /// Whether a line is to be logged now. If not, [`sum_up`](Self::sum_up) is to be asked when the period is over.
    fn admit(&mut self, now: Instant, line: &dyn Display) -> bool {
        self.begun.get_or_insert(now);
        self.lines += 1;
        let is_admitted = !self.is_storm && self.lines <= FIRST;
        if !is_admitted {
            self.left_out += 1;
            self.last = line.to_string();
        }
        is_admitted
    }

    /// Ends the period if it is over. What is to be logged of it.
    fn sum_up(&mut self, now: Instant) -> Option<String> {
        let begun = self.begun.filter(|&begun| now.saturating_duration_since(begun) >= PERIOD)?;
        self.is_storm = self.lines > FIRST;
        // What is a storm goes on without a gap, or is none any more.
        self.begun = self.is_storm.then_some(now);
        self.lines = 0;
        self.rest(now.saturating_duration_since(begun))
    }

    /// What was left out, to be logged after so long.
    fn rest(&mut self, time: Duration) -> Option<String> {
        let (left_out, last) = (std::mem::take(&mut self.left_out), std::mem::take(&mut self.last));
        (left_out > 0)
            .then(|| format!("{left_out} more lines like this one within {} s: {last}", time.as_secs()))
    }

    /// When the period is over, if there is something to sum up then.
    fn due(&self) -> Option<Instant> {
        Some(self.begun.filter(|_| self.left_out > 0)? + PERIOD)
    }
}

/// What is written to the log about a port. What happens as a matter of course and what is wrong do not crowd each other out.
pub struct PortLog {
    name: String,
    state: Mutex<State>,
}

struct State {
    info: Limit,
    warn: Limit,
    /// For the next sum.
    timer: TimerFd,
}

impl State {
    /// What is to be logged of the periods that are over.
    fn sums(&mut self, now: Instant) -> [(Level, Option<String>); 2] {
        [(Level::Info, self.info.sum_up(now)), (Level::Warn, self.warn.sum_up(now))]
    }

    fn arm(&mut self, now: Instant) {
        let Some(at) = self.info.due().into_iter().chain(self.warn.due()).min() else { return };
        // Zero would clear it. If it cannot be set, the sum comes with the next line.
        let _ = self.timer.reset(at.saturating_duration_since(now).max(Duration::from_millis(1)), None);
    }
}

impl PortLog {
    /// The log of port `name`.
    ///
    /// # Errors
    /// Of the timer, which the system may refuse.
    pub fn new(name: &str) -> io::Result<PortLog> {
        let state = State { info: Limit::default(), warn: Limit::default(), timer: TimerFd::new()? };
        Ok(PortLog { name: name.to_owned(), state: Mutex::new(state) })
    }

    /// The port's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Logs what happens as a matter of course.
    pub fn info(&self, line: impl Display) {
        self.say(Level::Info, &line);
    }

    /// Logs what is wrong.
    pub fn warn(&self, line: impl Display) {
        self.say(Level::Warn, &line);
    }

    fn say(&self, level: Level, line: &dyn Display) {
        let now = Instant::now();
        let state = &mut *self.lock();
        self.write(state.sums(now));
        let limit = if level == Level::Warn { &mut state.warn } else { &mut state.info };
        if limit.admit(now, line) {
            log::log!(level, "port {}: {line}", self.name);
        } else {
            state.arm(now);
        }
    }

    /// A timer that is readable when [`tick`](Self::tick) is to be called.
    pub fn timer(&self) -> RawFd {
        self.lock().timer.as_raw_fd()
    }

    /// Logs the sums that are due.
    pub fn tick(&self) {
        let now = Instant::now();
        let state = &mut *self.lock();
        // Not read: another thread may have set it anew since it fired, and then there is nothing to read.
        let _ = state.timer.clear();
        self.write(state.sums(now));
        state.arm(now);
    }

    fn write(&self, sums: [(Level, Option<String>); 2]) {
        for (level, sum) in sums {
            if let Some(sum) = sum {
                log::log!(level, "port {}: {sum}", self.name);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are right between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PortLog {
    fn drop(&mut self) {
        let now = Instant::now();
        let state = &mut *self.lock();
        let rest = |limit: &mut Limit| {
            let time = limit.begun.map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun));
            limit.rest(time)
        };
        let sums = [(Level::Info, rest(&mut state.info)), (Level::Warn, rest(&mut state.warn))];
        self.write(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port about which something is logged at times that the test tells.
    struct Bed {
        limit: Limit,
        start: Instant,
        written: Vec<String>,
    }

    impl Bed {
        fn new() -> Bed {
            Bed { limit: Limit::default(), start: Instant::now(), written: vec![] }
        }

        /// Lines at so many milliseconds after the start; the timer fires when it has to.
        fn line(&mut self, millis: u64, line: &str) {
            self.wait(millis);
            let now = self.start + Duration::from_millis(millis);
            self.written.extend(self.limit.sum_up(now));
            if self.limit.admit(now, &line) {
                self.written.push(line.to_owned());
            }
        }

        fn wait(&mut self, until: u64) {
            while let Some(due) = self.limit.due()
                && due <= self.start + Duration::from_millis(until)
            {
                self.written.extend(self.limit.sum_up(due));
            }
        }

        fn taken(&mut self) -> Vec<String> {
            std::mem::take(&mut self.written)
        }
    }

    #[test]
    fn a_few_lines_are_all_logged() {
        let mut bed = Bed::new();
        for number in 0..FIRST {
            bed.line(number, &format!("{number}"));
        }
        assert_eq!(bed.taken().len() as u64, FIRST);
        // So they are for ever, if they come no faster than that.
        for period in 1..50 {
            for number in 0..FIRST {
                bed.line(30_000 * period + 1000 * number, "again");
            }
        }
        assert_eq!(bed.taken().len() as u64, 49 * FIRST);
    }

    #[test]
    fn a_storm_is_summed_up_once_a_period_until_it_is_over() {
        let mut bed = Bed::new();
        // Ten lines a second for a hundred seconds.
        for number in 0..1000 {
            bed.line(100 * number, &format!("line {number}"));
        }
        let written = bed.taken();
        let first = FIRST as usize;
        assert!(written[..first].iter().enumerate().all(|(i, line)| *line == format!("line {i}")));
        assert_eq!(
            written[first..],
            [
                "280 more lines like this one within 30 s: line 299",
                "300 more lines like this one within 30 s: line 599",
                "300 more lines like this one within 30 s: line 899",
            ]
        );
        // The last of it is told although nothing comes any more; then all is as in the beginning.
        bed.wait(1_000_000);
        assert_eq!(bed.taken(), ["100 more lines like this one within 30 s: line 999"]);
        bed.line(1_000_000, "sum of nothing");
        bed.wait(2_000_000);
        for number in 0..FIRST {
            bed.line(2_000_000 + number, "calm");
        }
        let written = bed.taken();
        assert!(written.iter().filter(|line| *line == "calm").count() as u64 == FIRST, "{written:?}");
    }

    #[test]
    fn no_line_is_uncounted() {
        let mut bed = Bed::new();
        let mut sent = 0;
        // Storms of all lengths, with pauses of all lengths.
        for (start, lines) in [(0, 5), (1000, 40), (45_000, 21), (200_000, 500), (231_000, 3), (300_000, 1)] {
            for number in 0..lines {
                bed.line(start + 10 * number, "x");
                sent += 1;
            }
        }
        bed.wait(10_000_000);
        let count = |line: &String| match line.split_once(" more lines") {
            Some((left_out, _)) => left_out.parse().unwrap(),
            None => 1,
        };
        assert_eq!(bed.taken().iter().map(count).sum::<u64>(), sent);
    }

    #[test]
    fn what_is_wrong_is_told_in_a_storm_of_what_is_not() {
        let log = PortLog::new("p").unwrap();
        for _ in 0..1000 {
            log.info("link up");
        }
        let state = log.lock();
        assert_eq!(state.info.left_out, 1000 - FIRST);
        drop(state);
        log.warn("a ring is malformed");
        let state = log.lock();
        assert_eq!((state.warn.lines, state.warn.left_out), (1, 0));
        assert!(state.warn.due().is_none() && state.info.due().is_some());
    }
}
