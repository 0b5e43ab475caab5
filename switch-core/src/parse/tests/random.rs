//! Random frames, structured and not, on which the parser and its twin must agree.

use super::*;
use proptest::prelude::*;

/// Makes a frame of random nesting; every decision takes a byte off the tape, and an empty tape means the plainest choice.
struct Generator<'a> {
    tape: &'a [u8],
    frame: Vec<u8>,
}

impl Generator<'_> {
    fn pick(&mut self, n: usize) -> usize {
        let [first, rest @ ..] = self.tape else { return 0 };
        self.tape = rest;
        *first as usize % n
    }

    fn put(&mut self, text: &str) {
        self.frame.extend(hex(text));
    }

    fn bytes(&mut self, n: usize) {
        for _ in 0..n {
            let byte = self.pick(256) as u8;
            self.frame.push(byte);
        }
    }

    fn frame(tape: &[u8]) -> Vec<u8> {
        let mut generator = Generator { tape, frame: hex(MACS) };
        for _ in 0..[0, 0, 1, 1, 2, 3][generator.pick(6)] {
            let tpid = ["8100", "88a8"][generator.pick(2)];
            generator.put(tpid);
            generator.bytes(2);
        }
        match generator.pick(8) {
            0 => generator.put("0040 aaaa03000000"),
            1 => generator.put("0040 424203"),
            _ => {}
        }
        match generator.pick(8) {
            0..3 => generator.ipv4(),
            3..6 => generator.ipv6(),
            6 => {
                let kind =
                    ["0806", "8035", "0806 0001080006040001", "8035 0001080006040101"][generator.pick(4)];
                generator.put(kind);
                generator.bytes(24);
            }
            _ => {
                generator.put(["8847", "8848", "894f"][generator.tape.len() % 3]);
                for _ in 0..generator.pick(6) {
                    let label = ["0001003f", "0002013f"][generator.pick(4) / 3];
                    generator.put(label);
                }
            }
        }
        let tail = generator.pick(40);
        generator.bytes(tail);
        generator.frame
    }

    fn ipv4(&mut self) {
        let proto = [6, 17, 1, 132, 58, 47][self.pick(6)];
        let options = [0, 0, 0, 4, 40][self.pick(5)];
        let fragment = [0u16, 0x4000, 0x2000, 0x2001, 0x0100][self.pick(5)];
        let total = [40u16, 20, 0, 1500][self.pick(4)];
        self.put(&format!(
            "0800 4{:x}10 {total:04x} 0001 {fragment:04x} 40 {proto:02x} 0000",
            5 + options / 4
        ));
        self.bytes(8 + options);
        self.transport(proto);
    }

    fn ipv6(&mut self) {
        let mut next = [6, 17, 58, 132, 0, 43, 44, 51, 60, 59, 50][self.pick(11)];
        let len = [40u16, 0, 1500][self.pick(3)];
        self.put(&format!("86dd 6b8abcde {len:04x} {next:02x} ff {ADDRS}"));
        for _ in 0..16 {
            if ![0, 43, 44, 51, 60].contains(&next) {
                break;
            }
            let following = [6, 17, 58, 132, 0, 43, 44, 51, 60, 59, 60][self.pick(11)];
            let units = [0, 0, 0, 1, 2, 40][self.pick(6)];
            match next {
                44 => {
                    let offset = [0, 1, 8, 0x100][self.pick(4)];
                    self.put(&format!("{following:02x}00 {offset:04x} 00000001"));
                }
                51 => self.put(&format!("{following:02x}{units:02x}{}", "00".repeat(6 + 4 * units))),
                _ => self.put(&format!("{following:02x}{units:02x}{}", "00".repeat(6 + 8 * units))),
            }
            next = following;
        }
        self.transport(next);
    }

    fn transport(&mut self, proto: usize) {
        match proto {
            6 => {
                self.bytes(12);
                let offset = [5, 5, 6, 15, 4, 0][self.pick(6)];
                self.frame.push(offset << 4 | 0xf);
                self.bytes(3);
                self.put("00000000");
                self.bytes(offset.saturating_sub(5) as usize * 4);
            }
            58 if self.pick(4) > 0 => {
                let kind = ["8700", "8800", "8701", "8000"][self.pick(4)];
                self.put(&format!("{kind} 0000 00000000 {}", &ADDRS[..32]));
                for _ in 0..self.pick(5) {
                    let option =
                        ["0101 0200000000aa", "0201 0200000000bb", "0101 000000000000", "0000", "0502"]
                            [self.pick(5)];
                    self.put(option);
                    self.bytes(if option == "0502" { 14 } else { 0 });
                }
            }
            _ => self.bytes(20),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn agrees_with_the_twin(
        tape in proptest::collection::vec(any::<u8>(), 0..80),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        want in 0usize..300,
    ) {
        let mut frame = Generator::frame(&tape);
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len()));
        }
        for (at, value) in flips {
            if !frame.is_empty() {
                let at = at.index(frame.len());
                frame[at] = value;
            }
        }
        check_frame(&frame, want);
    }

    #[test]
    fn bytes_of_any_kind_do_no_harm(
        frame in proptest::collection::vec(any::<u8>(), 0..1500),
        want in 0usize..1500,
    ) {
        check_frame(&frame, want);
    }
}
