//! Each busy flow is seen alive in time, evenly, within the budget.

use crate::ovs::mirror::keepalive::{Ends, KeepAlive};
use crate::ovs::mirror::ports::Ports;
use crate::ovs::mirror::testing::*;
use crate::ovs::mirror::{MirrorTable, Settings};

/// Tables with `count` flows of each port, in turns, that are to be kept alive.
fn alive(settings: Settings, count: u64, ports: &[&'static str]) -> (FakeTable, KeepAlive) {
    let all = Ports::default().with_ports(vec![port("a", 1), port("b", 2)]);
    let (mut table, mut alive) = (FakeTable::default(), KeepAlive::new(settings));
    for to in 0..count {
        for from in ports {
            let spec = dp(from, to, "b").spec(&all).unwrap();
            let ends = Ends::of(&spec);
            let flow = table.insert(spec);
            alive.add(flow, ends, table.counters(flow), 0);
        }
    }
    (table, alive)
}

/// Lets time pass to `end`, with traffic every 50 ms. Gives the most keep-alives that were asked for in any 100 ms.
fn pass(
    table: &mut FakeTable,
    alive: &mut KeepAlive,
    from: u64,
    end: u64,
    mut traffic: impl FnMut(&mut FakeTable, u64),
) -> u64 {
    let (mut most, mut before) = (0, 0);
    for now in (from..end).step_by(10) {
        if now % 50 == 0 {
            traffic(table, now);
        }
        alive.turn(now);
        if now % 100 == 0 {
            let asked: u64 = table.flows.values().map(FakeFlow::asked).sum();
            if now != from {
                most = most.max(asked - before);
            }
            before = asked;
        }
    }
    most
}

#[test]
fn busy_flows_are_kept_alive_evenly() {
    let (mut table, mut alive) = alive(Settings::default(), 1000, &["a"]);
    // All but every tenth are busy, on the second worker.
    let most = pass(&mut table, &mut alive, 0, 60_000, |table, _| {
        (0..1000).filter(|i| i % 10 != 0).for_each(|i| table.traffic(i, 1, 3));
    });
    for (index, flow) in &table.flows {
        match index % 10 {
            0 => assert_eq!(flow.asked(), WORKERS as u64), // for the packet that it came for
            // Every 3.3 s: 18 in a minute.
            _ => assert!(
                (17..=19).contains(&flow.kept) && !flow.counters[0].is_due(),
                "{index}: {}",
                flow.kept
            ),
        }
    }
    assert!(most <= 900 / 33 * 2, "{most} in 100 ms: they come in lumps");
    assert!((250..=290).contains(&alive.rates().needed), "{:?}", alive.rates());
    assert_eq!((alive.given_up(), alive.rates().asked), (0, alive.rates().needed));
}

#[test]
fn a_flow_is_never_unseen_for_long() {
    // Whenever flows come and go, and whatever their rate.
    let (mut table, mut alive) = alive(Settings::default(), 300, &["a", "b"]);
    let mut last = vec![(0, 0); 600];
    let mut longest = 0;
    pass(&mut table, &mut alive, 0, 120_000, |table, now| {
        for i in 0..600u32 {
            // A packet every 50 ms to 6 s.
            if ((now + i as u64 * 37) / 50).is_multiple_of(1 + i as u64 % 120) {
                table.traffic(i, i as usize % 2, 1);
            }
            let kept = table.flows[&i].kept;
            if kept != last[i as usize].0 {
                longest = longest.max(now - last[i as usize].1);
                last[i as usize] = (kept, now);
            }
        }
    });
    assert!(longest < 10_000, "a flow was not seen for {longest} ms");
    assert!(last.iter().all(|(kept, at)| *kept > 0 && *at > 108_000));
}

#[test]
fn the_mark_follows_the_traffic_to_another_worker() {
    let (mut table, mut alive) = alive(Settings::default(), 1, &["a"]);
    pass(&mut table, &mut alive, 0, 5000, |table, _| table.traffic(0, 0, 9));
    // It is asked of the first once more, and then goes on by the second, which has had far fewer packets.
    while !table.flows[&0].counters[0].is_due() {
        table.traffic(0, 0, 1);
        table.flows[&0].counters[0].set_due();
    }
    let kept = table.flows[&0].kept;
    pass(&mut table, &mut alive, 5000, 15_000, |table, _| table.traffic(0, 1, 1));
    assert!(table.flows[&0].kept >= kept + 2);
}

#[test]
fn beyond_the_budget_the_coldest_are_given_up_and_taken_back() {
    // Room for 100 a second of a port: 333 in a period. 200 hot flows and 400 cold ones of port a, 100 of port b.
    let settings = Settings { port_rate: 100, total_rate: 1000, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 600, &["a"]);
    let all = Ports::default().with_ports(vec![port("a", 1), port("b", 2)]);
    for to in 0..100 {
        let spec = dp("b", to, "a").spec(&all).unwrap();
        let ends = Ends::of(&spec);
        let flow = table.insert(spec);
        alive.add(flow, ends, table.counters(flow), 0);
    }
    let busy = |table: &mut FakeTable, cold: bool| {
        (0..700).filter(|i| cold || *i >= 600 || i % 3 == 0).for_each(|i| {
            let packets = if i >= 600 || i % 3 != 0 { 2 } else { 100 };
            table.traffic(i, 0, packets);
        });
    };
    pass(&mut table, &mut alive, 0, 20_000, |table, _| busy(table, true));
    let before: Vec<u64> = table.flows.values().map(|flow| flow.kept).collect();
    let most = pass(&mut table, &mut alive, 20_000, 60_000, |table, _| busy(table, true));
    let kept: Vec<u64> = table.flows.values().zip(before).map(|(flow, before)| flow.kept - before).collect();
    for (i, &kept) in kept.iter().enumerate() {
        // The hot ones, and those of the other port, lack nothing: 12 in 40 seconds.
        assert!((i < 600 && i % 3 != 0) || (11..=13).contains(&kept), "{i}: {kept}");
    }
    let cold = || (0..600).filter(|i| i % 3 != 0).map(|i| kept[i]);
    // Of the cold ones a third are kept, always the same; the rest is left alone.
    let (served, left) =
        (cold().filter(|kept| *kept >= 10).count(), cold().filter(|kept| *kept <= 2).count());
    assert!((100..=150).contains(&served) && served + left >= 360, "{served} {left}");
    assert!((240..=300).contains(&alive.given_up()), "{}", alive.given_up());
    assert!(most <= 40, "{most} in 100 ms");
    assert!((190..=220).contains(&alive.rates().needed) && alive.rates().asked <= 135, "{:?}", alive.rates());
    // With the cold ones idle nothing is given up; with a budget, they are taken back.
    pass(&mut table, &mut alive, 60_000, 80_000, |table, _| busy(table, false));
    assert_eq!(alive.given_up(), 0);
    alive.set(Settings { port_rate: 2000, ..settings }, 80_000);
    pass(&mut table, &mut alive, 80_000, 100_000, |table, _| busy(table, true));
    assert_eq!(alive.given_up(), 0);
    // The budget of all holds too, over both ports.
    alive.set(Settings { port_rate: 2000, total_rate: 60, ..settings }, 100_000);
    pass(&mut table, &mut alive, 100_000, 120_000, |table, _| busy(table, true));
    assert!((450..=550).contains(&alive.given_up()), "{}", alive.given_up());
    assert!(alive.rates().asked <= 66, "{:?}", alive.rates());
    // What goes is given up no longer.
    (0..700).for_each(|index| alive.remove(index));
    assert_eq!((alive.given_up(), alive.tick()), (0, None));
}

#[test]
fn the_first_round_keeps_to_the_budget_too() {
    let settings = Settings { port_rate: 100, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 5000, &["a"]);
    pass(&mut table, &mut alive, 0, 6700, |table, _| (0..5000).for_each(|i| table.traffic(i, 0, 1)));
    let asked: u64 = table.flows.values().map(FakeFlow::asked).sum();
    assert!((100..=670).contains(&asked), "{asked}");
}

#[test]
fn a_stall_of_the_thread_makes_no_lump() {
    let (mut table, mut alive) = alive(Settings::default(), 1000, &["a"]);
    let busy = |table: &mut FakeTable, _| (0..1000).for_each(|i| table.traffic(i, 0, 1));
    pass(&mut table, &mut alive, 0, 10_000, busy);
    let most = pass(&mut table, &mut alive, 13_000, 20_000, busy);
    assert!(most <= 70, "{most} in 100 ms");
}

#[test]
fn short_idle_times_and_few_flows() {
    let settings = Settings { max_idle: 500, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 1, &["a"]);
    assert_eq!(alive.period(), 166);
    pass(&mut table, &mut alive, 0, 5000, |table, _| table.traffic(0, 0, 1));
    assert!((20..=31).contains(&table.flows[&0].kept), "{}", table.flows[&0].kept);
    alive.set(Settings { max_idle: 1, ..settings }, 5000);
    assert_eq!(alive.period(), 50);
    alive.set(Settings { max_idle: 1 << 40, ..settings }, 5000);
    assert_eq!(alive.period(), 5000);
}
