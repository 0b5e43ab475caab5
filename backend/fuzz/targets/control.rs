//! Requests on the control socket: no line makes the reader panic, and what it takes reads the same when it is written again.
#![no_main]

use backend::control::protocol::Request;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    if let Ok(request) = Request::parse(line) {
        let again = request.to_line().expect("a request that can be written");
        assert_eq!(Request::parse(again.trim_end().as_bytes()).as_ref(), Ok(&request));
    }
});
