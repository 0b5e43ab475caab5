//! The control server over real sockets: what clients do wrong costs them their connection and nobody else anything.

mod common;

use backend::control::client::{ClientError, call};
use backend::control::protocol::{Done, Flow, FlowSource, Flows, Request, Response, Synced, Version};
use backend::control::server::{ControlServer, Limits, Reply};
use backend::socket_file::ListenError;
use common::FakeDaemon;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_secs(20);
/// What a client that is too slow gets in these tests.
const PATIENCE: Duration = Duration::from_millis(600);

fn impatient() -> Limits {
    Limits { patience: PATIENCE, ..Limits::default() }
}

/// `del-port` is done at once, `stats` refuses, `sync` takes its timeout, `dump-flows` is large.
fn answer(request: Request) -> Reply {
    match request {
        Request::DelPort { .. } => Reply::ok(Response::Done(Done { ok: true })),
        Request::Stats { .. } => Reply::error("not\ntoday"),
        Request::Sync { timeout } => {
            let done = Instant::now() + Duration::from_secs_f64(timeout);
            Reply::Later(Box::new(move |now| {
                (now >= done).then_some(Ok(Response::Synced(Synced { flows: 3 })))
            }))
        }
        Request::DumpFlows { .. } => Reply::ok(Response::Flows(many_flows())),
        _ => Reply::ok(Response::Version(Version::own())),
    }
}

/// About 20 MB of JSON.
fn many_flows() -> Flows {
    let flow = |index: usize| Flow {
        id: format!("{index}.1"),
        ufid: None,
        source: FlowSource::Learned,
        flow: "in_port(vm1),eth(src=52:54:00:00:00:01,dst=52:54:00:00:00:02)".into(),
        actions: "vm2".into(),
        handling: "fast".into(),
        packets: 1,
        bytes: 60,
        tcp_flags: 0,
        used_seconds: None,
        offloaded: None,
        estimated: false,
    };
    Flows { flows: (0..100_000).map(flow).collect() }
}

fn connect(daemon: &FakeDaemon) -> UnixStream {
    let stream = UnixStream::connect(&daemon.path).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn read_line(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    line
}

/// Everything until the server closes; a reset counts as closed.
fn read_to_close(mut stream: &UnixStream) -> Vec<u8> {
    let (mut all, mut chunk) = (Vec::new(), [0; 65_536]);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return all,
            Ok(n) => all.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

fn works(daemon: &FakeDaemon) {
    let version: Version = call(&daemon.path, &Request::Version {}, TIMEOUT).unwrap();
    assert_eq!(version, Version::own());
}

#[test]
fn requests_are_answered_in_order_however_they_arrive() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let mut stream = connect(&daemon);
    stream
        .write_all(
            b"{\"v\":1,\"cmd\":\"version\"}\n{\"v\":1,\"cmd\":\"sync\",\"timeout\":0.05}\n{\"v\":1,\"cmd\":\"stats\"}\n{\"v\":1,\"cmd\":",
        )
        .unwrap();
    assert!(read_line(&stream).contains("\"protocol\":1"));
    assert_eq!(read_line(&stream), "{\"flows\":3}\n");
    assert_eq!(read_line(&stream), "{\"error\":\"not today\"}\n");
    for byte in b"\"del-port\",\"name\":\"a\"}\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(read_line(&stream), "{\"ok\":true}\n");
    // A client that says it has nothing more to say still gets its answer.
    stream.write_all(b"{\"v\":1,\"cmd\":\"sync\",\"timeout\":0.05}\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_close(&stream), b"{\"flows\":3}\n");
}

#[test]
fn many_requests_at_once_are_all_answered_and_hold_up_nobody() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let mut stream = connect(&daemon);
    let writer = stream.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        (&writer).write_all(&b"{\"v\":1,\"cmd\":\"del-port\",\"name\":\"a\"}\n".repeat(5000)).unwrap();
    });
    works(&daemon);
    let mut answers = vec![0; 5000 * b"{\"ok\":true}\n".len()];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, b"{\"ok\":true}\n".repeat(5000));
    thread.join().unwrap();
}

#[test]
fn malformed_requests_get_an_error_and_the_end() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let bystander = connect(&daemon);
    for request in ["\n", "{\n", "[]\n", "{\"v\":1,\"cmd\":\"halt\"}\n", "\u{1}\u{0}\n", "GET / HTTP/1.1\r\n"]
    {
        let mut stream = connect(&daemon);
        stream.write_all(request.as_bytes()).unwrap();
        // What comes after it is not looked at.
        let _ = stream.write_all(b"{\"v\":1,\"cmd\":\"version\"}\n");
        let answer = String::from_utf8(read_to_close(&stream)).unwrap();
        assert!(answer.starts_with("{\"error\":\"malformed request: "), "{request:?} gets {answer:?}");
        assert_eq!(answer.matches('\n').count(), 1, "{request:?} gets {answer:?}");
    }
    (&bystander).write_all(b"{\"v\":1,\"cmd\":\"del-port\",\"name\":\"a\"}\n").unwrap();
    assert_eq!(read_line(&bystander), "{\"ok\":true}\n");
}

#[test]
fn garbage_does_no_harm() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..50 {
        let bytes: Vec<u8> = (0..round * 40)
            .map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random as u8
            })
            .collect();
        // The server may close while we write.
        let _ = connect(&daemon).write_all(&bytes);
    }
    works(&daemon);
}

#[test]
fn requests_have_a_longest_length() {
    let limit = Limits::default().request;
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let request = |length: usize| {
        let frame = "{\"v\":1,\"cmd\":\"del-port\",\"name\":\"\"}\n";
        frame.replace("\"\"", &format!("\"{}\"", "x".repeat(length - frame.len())))
    };
    let mut stream = connect(&daemon);
    stream.write_all(request(limit).as_bytes()).unwrap();
    assert_eq!(read_line(&stream), "{\"ok\":true}\n");
    for bytes in [request(limit + 1).into_bytes(), vec![b'x'; 1 << 20]] {
        let mut stream = connect(&daemon);
        let _ = stream.write_all(&bytes);
        let answer = read_to_close(&stream);
        assert_eq!(answer, b"{\"error\":\"the request is longer than 65536 bytes\"}\n");
    }
    works(&daemon);
}

#[test]
fn slow_senders_are_closed() {
    let daemon = FakeDaemon::start(impatient(), answer);
    let (silent, trickling) = (connect(&daemon), connect(&daemon));
    let start = Instant::now();
    let mut closed = None;
    // Each byte in time, but never a line.
    while start.elapsed() < 20 * PATIENCE {
        if (&trickling).write_all(b" ").is_err() {
            closed = Some(start.elapsed());
            break;
        }
        works(&daemon);
        std::thread::sleep(Duration::from_millis(10));
    }
    let closed = closed.expect("the trickling client stays connected");
    assert!(closed >= PATIENCE, "closed after {closed:?}");
    assert_eq!(read_to_close(&silent), b"");
    works(&daemon);
}

#[test]
fn clients_that_do_not_take_their_answer_are_closed() {
    let daemon = FakeDaemon::start(impatient(), answer);
    let stream = connect(&daemon);
    (&stream).write_all(b"{\"v\":1,\"cmd\":\"dump-flows\"}\n").unwrap();
    let start = Instant::now();
    while start.elapsed() < 4 * PATIENCE {
        works(&daemon);
        std::thread::sleep(Duration::from_millis(20));
    }
    let taken = read_to_close(&stream);
    assert!(!taken.is_empty() && !taken.ends_with(b"\n"), "{} bytes", taken.len());
}

#[test]
fn large_answers_arrive_whole() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let request = Request::DumpFlows { port: None, source: None };
    let flows: Flows = call(&daemon.path, &request, TIMEOUT).unwrap();
    assert_eq!(flows, many_flows());
}

#[test]
fn answers_have_a_longest_length() {
    let daemon = FakeDaemon::start(Limits { response: 1 << 20, ..Limits::default() }, answer);
    let request = Request::DumpFlows { port: None, source: None };
    let error = call::<Flows>(&daemon.path, &request, TIMEOUT).unwrap_err();
    assert!(error.to_string().starts_with("the answer is longer than 1048576 bytes"), "{error}");
    works(&daemon);
}

#[test]
fn clients_beyond_the_limit_are_told_so() {
    let daemon = FakeDaemon::start(Limits { clients: 3, ..Limits::default() }, answer);
    let mut clients: Vec<UnixStream> = (0..3).map(|_| connect(&daemon)).collect();
    for client in &clients {
        (&*client).write_all(b"{\"v\":1,\"cmd\":\"del-port\",\"name\":\"a\"}\n").unwrap();
        assert_eq!(read_line(client), "{\"ok\":true}\n");
    }
    let error = call::<Version>(&daemon.path, &Request::Version {}, TIMEOUT).unwrap_err();
    assert!(matches!(&error, ClientError::Refused(reason) if reason.contains("too many clients")), "{error}");
    clients.pop();
    for _ in 0..100 {
        works(&daemon);
    }
}

#[test]
fn late_answers_hold_up_nobody_and_are_asked_to_their_end() {
    let finished = Arc::new(AtomicBool::new(false));
    let flag = finished.clone();
    let handler = move |request| match request {
        Request::Sync { .. } => {
            let (flag, start) = (flag.clone(), Instant::now());
            Reply::Later(Box::new(move |now| {
                let done = now >= start + Duration::from_secs(1);
                flag.fetch_or(done, Ordering::SeqCst);
                done.then_some(Ok(Response::Synced(Synced { flows: 0 })))
            }))
        }
        other => answer(other),
    };
    let daemon = FakeDaemon::start(Limits::default(), handler);
    let stream = connect(&daemon);
    (&stream).write_all(b"{\"v\":1,\"cmd\":\"sync\",\"timeout\":1}\n").unwrap();
    works(&daemon);
    assert!(!finished.load(Ordering::SeqCst), "the other client had to wait");
    drop(stream);
    let deadline = Instant::now() + TIMEOUT;
    while !finished.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "nobody asked after the client had gone");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_idle_server_is_not_woken() {
    let daemon = FakeDaemon::start(impatient(), answer);
    let _: Synced = call(&daemon.path, &Request::Sync { timeout: 0.02 }, TIMEOUT).unwrap();
    works(&daemon);
    // The end of the last client, and a timer that was set for it.
    std::thread::sleep(2 * PATIENCE);
    let before = daemon.events.load(Ordering::Relaxed);
    std::thread::sleep(2 * PATIENCE);
    assert_eq!(daemon.events.load(Ordering::Relaxed), before);
}

#[test]
fn the_socket_belongs_to_one_daemon_and_goes_with_it() {
    let daemon = FakeDaemon::start(Limits::default(), answer);
    let path = daemon.path.clone();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let second = ControlServer::bind(&path, None, Limits::default(), answer);
    assert!(matches!(second.err(), Some(ListenError::Live(_))));
    works(&daemon);
    drop(daemon);
    assert!(!path.exists());
    let error = call::<Version>(&path, &Request::Version {}, TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::NoDaemon(_)));
}
