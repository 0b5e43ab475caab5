//! The underlay changes while traffic runs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::packet::{Mac, Packet};
use qemu_tests::host::wait_for;
use qemu_tests::overlay::{DEVICE, Kind, Site, UNDERLAY, send_raw, set_tunnel, text};

use crate::bed::{Bed, LATE, MTU, ip};

/// Between two packets of the stream.
const PACE: Duration = Duration::from_millis(2);

/// Echoes by UDP from the first guest to the second and back: the longest time without one while `change` is made and until
/// it holds (`holds`) and echoes come again.
fn gap(
    bed: &Bed,
    change: impl FnOnce() -> Result<()>,
    holds: impl FnMut() -> Result<Option<()>>,
) -> Result<Duration> {
    let socket = |guest: usize| {
        bed.guests[guest].run(|| {
            let socket = UdpSocket::bind(SocketAddr::new(ip(guest, false), 9))?;
            socket.set_read_timeout(Some(PACE))?;
            Ok(socket)
        })
    };
    let (near, far) = (socket(0)?, socket(1)?);
    near.connect(SocketAddr::new(ip(1, false), 9))?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((len, from)) = far.recv_from(&mut buffer) {
                    // While the path is broken, some are lost.
                    let _ = far.send_to(&buffer[..len], from);
                }
            }
        });
        // When each echo came.
        let echoes = scope.spawn(|| {
            let (mut times, mut buffer) = (Vec::new(), [0; 64]);
            while !stop.load(Ordering::Relaxed) {
                let _ = near.send(b"are you there?");
                if near.recv(&mut buffer).is_ok() {
                    times.push(Instant::now());
                    std::thread::sleep(PACE);
                }
            }
            times
        });
        let outcome = (|| {
            // Flows are known before.
            let mut fast = 0.0;
            wait_for("the stream to be forwarded by workers", LATE, || {
                let pause = || {
                    std::thread::sleep(Duration::from_millis(200));
                    Ok(())
                };
                fast = bed.share(crate::bed::PORTS[0], pause)?.0;
                Ok((fast > 0.9).then_some(()))
            })
            .with_context(|| format!("{fast}: {}", bed.state()))?;
            let start = Instant::now();
            change()?;
            wait_for("the change to take effect", LATE, holds).with_context(|| bed.state())?;
            let settled = Instant::now();
            std::thread::sleep(Duration::from_millis(300));
            Ok::<_, anyhow::Error>((start, settled))
        })();
        stop.store(true, Ordering::Relaxed);
        let times = echoes.join().map_err(|_| anyhow::anyhow!("the stream panicked"))?;
        let (start, settled) = outcome?;
        ensure!(
            times.last().is_some_and(|&last| last > settled),
            "no echo after the change: {}",
            bed.state()
        );
        let mut last = start;
        let mut longest = Duration::ZERO;
        for time in times.into_iter().filter(|&time| time > start) {
            longest = longest.max(time - last);
            last = time;
        }
        Ok(longest)
    })
}

/// Packets that the far node's underlay has had for a MAC address, by the rule for it.
fn packets_for(bed: &Bed, mac: Mac) -> Result<u64> {
    let flows = bed.nodes.ovs[1].ofctl(&["dump-flows", UNDERLAY, &format!("dl_dst={}", text(mac))])?;
    let count = flows.split(['=', ',', ' ']).skip_while(|&word| word != "n_packets").nth(1);
    Ok(count.with_context(|| format!("no rule for {}: {flows}", text(mac)))?.parse()?)
}

/// Has the far node count what comes for a MAC address; packets for an address that is not its own are then as if for its own.
fn count(bed: &Bed, mac: Mac, own: Mac) -> Result<()> {
    let rule = format!("priority=10,dl_dst={},actions=mod_dl_dst:{},LOCAL", text(mac), text(own));
    bed.nodes.ovs[1].ofctl(&["add-flow", UNDERLAY, &rule]).map(drop)
}

#[test]
fn traffic_goes_on_when_the_path_changes() -> Result<()> {
    let bed = Bed::new(MTU)?;
    let [near, far] = &bed.nodes.ovs;
    bed.tunnel(Kind::Vxlan, false)?;

    // The other end has another MAC address, and says so as a host does.
    let moved: Mac = [2, 0, 0, 0, 0xf0, 0x82];
    count(&bed, moved, moved)?;
    let says =
        Packet::eth(moved, Site(1).mac()).arp_reply(Site(2).v4().octets(), Site(1).v4().octets()).build();
    let change = || {
        far.vsctl(&["set", "bridge", UNDERLAY, &format!("other-config:hwaddr=\"{}\"", text(moved))])?;
        far.namespace().ip(&["link", "set", UNDERLAY, "address", &text(moved)])?;
        send_raw(far, DEVICE, &says)
    };
    let took = gap(&bed, change, || Ok((packets_for(&bed, moved)? > 10).then_some(())))?;
    println!("the other end's MAC address changes: {:.0} ms without an answer", took.as_secs_f64() * 1e3);

    // The other end is behind a router, and then behind another one: both are the far node itself.
    let routers = [3, 4].map(Site);
    for router in routers {
        count(&bed, router.mac(), moved)?;
        let address = router.v4().to_string();
        near.appctl(&["tnl/neigh/set", UNDERLAY, &address, &text(router.mac())])?;
    }
    let end = Ipv4Addr::new(198, 51, 100, 2);
    far.namespace().ip(&["addr", "add", &format!("{end}/32"), "dev", UNDERLAY])?;
    let route = |router: Site| {
        let via = router.v4().to_string();
        near.namespace().ip(&["route", "replace", &format!("{end}/32"), "via", &via, "dev", UNDERLAY])
    };
    route(routers[0])?;
    set_tunnel(near, Kind::Vxlan, IpAddr::V4(end), &[])?;
    set_tunnel(far, Kind::Vxlan, Site(1).v4().into(), &[&format!("options:local_ip={end}")])?;
    bed.reach(false)?;
    let before = packets_for(&bed, routers[0].mac())?;
    ensure!(before > 0, "nothing goes by the first router");
    let took =
        gap(&bed, || route(routers[1]), || Ok((packets_for(&bed, routers[1].mac())? > 10).then_some(())))?;
    println!("the route changes: {:.0} ms without an answer", took.as_secs_f64() * 1e3);
    let then = packets_for(&bed, routers[0].mac())?;
    bed.reach(false)?;
    ensure!(packets_for(&bed, routers[0].mac())? == then, "some still go by the first router");
    bed.finish()
}
