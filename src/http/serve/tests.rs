use std::sync::Mutex;
use std::thread;

use super::super::Request;
use super::*;
use crate::deadline::Stopwatch;
use crate::net::stream::tests::pair;

/// Says back what it was asked; `/stream`, `/broken` and `/big` have bodies of their own.
#[derive(Default)]
struct Echo {
    bodies: Mutex<Vec<Vec<u8>>>,
}

impl Handler for Echo {
    fn handle(&self, request: &Request, client: &mut dyn Client) -> Response {
        self.bodies.lock().expect("no panics").push(request.body.clone());
        match request.path().as_slice() {
            ["stream"] => Response::stream("text/plain", |out| {
                out.write(b"one,")?;
                out.write(b"")?;
                out.write(b"two")
            }),
            ["broken"] => Response::stream("text/plain", |out| out.write(b"half").and(Err(net::Error::Closed))),
            ["until-over"] => Response::stream("text/plain", |out| {
                while !out.is_over() {
                    out.write(b"tick")?;
                }
                Ok(())
            }),
            ["until-left"] => {
                while !client.is_over() {
                    thread::park_timeout(std::time::Duration::from_millis(5));
                }
                Response::text(Status::Ok, "over")
            }
            ["looks", count] => {
                let count: u32 = count.parse().expect("a number");
                let overs = (0..count).filter(|_| {
                    thread::park_timeout(std::time::Duration::from_millis(limits::HEARTBEAT_HALF_CLOSED_MS / 4));
                    client.is_over()
                });
                Response::text(Status::Ok, overs.count().to_string())
            }
            ["big"] => Response::full(Status::Ok, "application/octet-stream", vec![b'x'; 8 << 20]),
            path => Response::text(Status::Ok, format!("{} /{} {}", request.method.as_str(), path.join("/"), request.body.len())),
        }
    }

    fn reject(&self, reject: &Reject) -> Response {
        Response::text(reject.status(), reject.to_string())
    }
}

fn connection(stream: Stream) -> Connection {
    // Long where a test does not wait for it, short where every test does.
    Connection::new(stream, Patience { linger_ms: 200, ..Patience::default() })
}

fn soon() -> Deadline {
    Deadline::within_ms(20_000, "test")
}

fn read_to_end(client: &mut Stream) -> String {
    let (mut all, mut bytes) = (Vec::new(), [0; 4096]);
    loop {
        match client.read(&mut bytes, soon()).expect("readable") {
            0 => return String::from_utf8(all).expect("text"),
            n => all.extend_from_slice(bytes.get(..n).unwrap_or_default()),
        }
    }
}

/// Everything the server says to a client that sends `input`, closes its sending side and only then reads. `adjust` the server first.
fn talk_with(input: &[u8], handler: &Echo, adjust: impl FnOnce(&mut Connection)) -> String {
    let (ours, mut client) = pair();
    let mut server = connection(ours);
    adjust(&mut server);
    thread::scope(|scope| {
        scope.spawn(|| {
            let sent = client.write_all(input, soon());
            drop(sent); // A server that refused need not read on.
            client.shutdown(Shutdown::Write);
        });
        server.run(handler, &AtomicBool::new(false));
    });
    read_to_end(&mut client)
}

fn talk(input: &str) -> String {
    talk_with(input.as_bytes(), &Echo::default(), |_| {})
}

/// The responses in `output`: status line's code and body, by Content-Length or chunks, or all the rest.
fn split(mut output: &str) -> Vec<(String, String)> {
    let mut responses = Vec::new();
    while !output.is_empty() {
        let (head, rest) = output.split_once("\r\n\r\n").expect("a whole head");
        let code = head.split(' ').nth(1).expect("a status").to_owned();
        let length = head.split("\r\n").find_map(|line| line.strip_prefix("Content-Length: ")).map(|n| n.parse().expect("a number"));
        let (body, rest) = match length {
            Some(length) => rest.split_at(length),
            None if code == "100" => ("", rest),
            None if head.contains("\r\nTransfer-Encoding: chunked") => rest.split_at(rest.find("0\r\n\r\n").expect("the last chunk") + 5),
            None => (rest, ""),
        };
        responses.push((code, body.to_owned()));
        output = rest;
    }
    responses
}

fn check(input: &str, expect: &[(&str, &str)]) {
    let responses = split(&talk(input));
    assert_eq!(responses.iter().map(|(c, b)| (c.as_str(), b.as_str())).collect::<Vec<_>>(), expect, "{input:?}");
}

#[test]
fn requests_are_answered_in_order_on_one_connection() {
    check("GET /a HTTP/1.1\r\nHost: h\r\n\r\n", &[("200", "GET /a 0")]);
    check("", &[]);
    check("\r\n\r\n", &[]);
    check(
        "\r\nPOST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc\r\n\
         PUT /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nT: x\r\n\r\n\
         GET /stream HTTP/1.1\r\nHost: h\r\n\r\nDELETE /d HTTP/1.1\r\nHost: h\r\n\r\n\r\n",
        &[("200", "POST /a 3"), ("200", "PUT /b 2"), ("200", "4\r\none,\r\n3\r\ntwo\r\n0\r\n\r\n"), ("200", "DELETE /d 0")],
    );
    check("GET /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET /b HTTP/1.1\r\nHost: h\r\n\r\n", &[("200", "GET /a 0")]);
    check("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n", &[("200", "GET /a 0"), ("200", "GET /b 0")]);
    check("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", &[("200", "OPTIONS / 0")]);
    // Without a framing the body is empty, and what follows is the next request.
    check(
        "POST / HTTP/1.1\r\nHost: h\r\n\r\n{}",
        &[("200", "POST / 0"), ("400", "a request begins with a method, a target and HTTP/1.1, one space apart, and CRLF")],
    );
}

#[test]
fn it_does_not_matter_where_reads_end() {
    let input = "POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab\r\nc\
         PUT /b HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n\
         3;x=y\r\nabc\r\n1\r\n\n\r\n0\r\nT: x\r\n\r\n\
         GET /c?d=e HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    for read_bytes in 1..=input.len() {
        let echo = Echo::default();
        let responses = split(&talk_with(input.as_bytes(), &echo, |server| server.read_bytes = read_bytes));
        let expect = [("200", "POST /a 5"), ("100", ""), ("200", "PUT /b 4"), ("200", "GET /c 0")];
        assert_eq!(responses.iter().map(|(c, b)| (c.as_str(), b.as_str())).collect::<Vec<_>>(), expect, "by {read_bytes}");
        assert_eq!(echo.bodies.into_inner().expect("no panics"), [b"ab\r\nc".to_vec(), b"abc\n".to_vec(), vec![]], "by {read_bytes}");
    }
}

#[test]
fn a_refused_request_is_the_last_one() {
    const NEXT: &str = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
    let check = |input: &str, code: &str| {
        let output = talk(&[input, NEXT].concat());
        let responses = split(&output);
        assert_eq!(responses.iter().map(|(c, _)| c.as_str()).collect::<Vec<_>>(), [code], "{input:?}");
        assert!(output.contains("\r\nConnection: close\r\n"), "{output}");
    };
    check("GET / HTTP/3.0\r\nHost: h\r\n\r\n", "505");
    check("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400");
    check("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "400");
    check("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 524289\r\nExpect: 100-continue\r\n\r\n", "413");
    check("POST / HTTP/1.1\r\nHost: h\r\nExpect: tea\r\n\r\n", "417");
}

#[test]
fn a_refused_client_that_still_sends_is_heard_out() {
    for (head, code) in [("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\n", "413"), ("AAAAAAAAAAAAAAAAAAAA", "501")] {
        let (ours, mut client) = pair();
        thread::scope(|scope| {
            scope.spawn(|| connection(ours).run(&Echo::default(), &AtomicBool::new(false)));
            // A close with these bytes unread would end the client's write with an error, and many clients then read no response.
            let body = "A".repeat(2_000_000);
            client.write_all([head, &body].concat().as_bytes(), soon()).expect("all is taken");
            assert_eq!(split(&read_to_end(&mut client)).first().map(|(code, _)| code.as_str()), Some(code));
        });
    }
}

#[test]
fn an_end_in_the_middle_is_400() {
    for input in [
        "G",
        "GET / HTTP/1.1\r\nHost: h\r\n",
        "PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab",
        "PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    ] {
        check(input, &[("400", "the connection ended before the request was complete")]);
    }
}

#[test]
fn head_is_get_without_the_body() {
    let fields = |input: &str| {
        let output = talk(input);
        let (head, body) = output.split_once("\r\n\r\n").expect("a head");
        (head.split("\r\n").filter(|line| !line.starts_with("Date: ")).map(str::to_owned).collect::<Vec<_>>(), body.to_owned())
    };
    for path in ["/big", "/stream", "/broken"] {
        let (head, body) = fields(&format!("HEAD {path} HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert_eq!(body, "", "{path}");
        assert!(head.iter().any(|l| l == "Content-Length: 8388608" || l == "Transfer-Encoding: chunked"), "{path}: {head:?}");
        if path == "/stream" {
            assert_eq!(head, fields("GET /stream HTTP/1.1\r\nHost: h\r\n\r\n").0);
        }
    }
}

#[test]
fn a_stream_ends_as_its_version_can_say() {
    assert!(talk("GET /stream HTTP/1.1\r\nHost: h\r\n\r\n").ends_with("4\r\none,\r\n3\r\ntwo\r\n0\r\n\r\n"));
    let old = talk("GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /a HTTP/1.0\r\n\r\n");
    assert!(old.ends_with("Connection: close\r\n\r\none,two"), "{old}");
    // A stream that failed has no last chunk, so nobody takes it for whole.
    assert!(talk("GET /broken HTTP/1.1\r\nHost: h\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n").ends_with("\r\n\r\n4\r\nhalf\r\n"));
}

#[test]
fn a_producer_learns_that_the_client_left_and_keeps_what_it_sent() {
    let (ours, mut client) = pair();
    let first = "GET /until-over HTTP/1.1\r\nHost: h\r\n\r\n";
    client.write_all([first, "GET /a HTTP/1.1\r\nHost: h\r\n\r\n"].concat().as_bytes(), soon()).expect("written");
    client.shutdown(Shutdown::Write);
    let mut server = connection(ours);
    server.read_bytes = first.len();
    server.run(&Echo::default(), &AtomicBool::new(false));
    let responses = split(&read_to_end(&mut client));
    let bodies: Vec<_> = responses.iter().map(|(_, body)| body.as_str()).collect();
    assert_eq!(bodies, ["4\r\ntick\r\n0\r\n\r\n", "GET /a 0"]);
}

#[test]
fn the_body_may_be_as_big_as_the_limit() {
    let max = limits::HTTP_BODY_BYTES_MAX;
    let echo = Echo::default();
    let input = format!("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: {max}\r\n\r\n{}", "x".repeat(max));
    assert!(talk_with(input.as_bytes(), &echo, |_| {}).ends_with("PUT / 524288"));
    let input =
        format!("PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n{max:x}\r\n{}\r\n1\r\nx\r\n0\r\n\r\n", "x".repeat(max));
    assert!(talk_with(input.as_bytes(), &echo, |_| {}).starts_with("HTTP/1.1 413 "));
}

#[test]
fn a_client_that_waits_for_continue_gets_it_before_it_sends() {
    let (ours, mut client) = pair();
    thread::scope(|scope| {
        scope.spawn(|| connection(ours).run(&Echo::default(), &AtomicBool::new(false)));
        let head = b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n";
        client.write_all(head, soon()).expect("written");
        let mut bytes = [0; 25];
        assert_eq!(client.read(&mut bytes, soon()).expect("read"), 25);
        assert_eq!(&bytes, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"ab", soon()).expect("written");
        assert!(read_to_end(&mut client).ends_with("PUT /a 2"));
    });
}

#[test]
fn waiting_ends_and_says_for_what() {
    let patience = Patience { idle_ms: 30, head_ms: 30, body_ms: 30, write_ms: 30, linger_ms: 30 };
    for (input, expect) in [
        ("", vec![]),
        ("\r\n", vec![]),
        ("GET /a HTTP/1.1\r\nHost: h\r\n\r\n", vec!["200"]),
        ("GET / HTTP/1.1\r\n", vec!["408"]),
        ("GET /a HTTP/1.1\r\nHost: h\r\n\r\nG", vec!["200", "408"]),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab", vec!["408"]),
        ("PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", vec!["408"]),
    ] {
        let (ours, mut client) = pair();
        client.write_all(input.as_bytes(), soon()).expect("written");
        Connection::new(ours, patience).run(&Echo::default(), &AtomicBool::new(false));
        let output = split(&read_to_end(&mut client));
        assert_eq!(output.iter().map(|(code, _)| code.as_str()).collect::<Vec<_>>(), expect, "{input:?}");
    }
}

#[test]
fn dripping_bytes_gains_no_time() {
    let (ours, mut client) = pair();
    let patience = Patience { head_ms: 100, linger_ms: 30, ..Patience::default() };
    thread::scope(|scope| {
        scope.spawn(|| Connection::new(ours, patience).run(&Echo::default(), &AtomicBool::new(false)));
        client.write_all(b"GET / HTTP/1.1\r\nX: ", soon()).expect("written");
        let (watch, mut bytes) = (Stopwatch::start(), [0; 12]);
        // Each byte is well within the time the head has; all of them are not.
        while client.read(&mut bytes, Deadline::within_ms(5, "drip")).is_err() {
            assert!(watch.elapsed_ms() < 10_000, "still served");
            client.write_all(b"x", soon()).expect("written");
        }
        assert_eq!(&bytes, b"HTTP/1.1 408");
    });
}

#[test]
fn a_client_that_never_reads_loses_its_connection() {
    for path in ["/big", "/until-over"] {
        let (ours, mut client) = pair();
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes(), soon()).expect("written");
        let mut server = Connection::new(ours, Patience { write_ms: 30, linger_ms: 30, ..Patience::default() });
        let end = server.converse(&Echo::default(), &AtomicBool::new(false));
        assert!(matches!(&end, Err(net::Error::Expired(e)) if e.phase == "write"), "{end:?}");
    }
}

#[test]
fn the_last_response_says_so() {
    const GET: &str = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n";
    let output = talk_with(GET.repeat(3).as_bytes(), &Echo::default(), |server| server.requests_left = 2);
    assert_eq!(output.matches("200 OK").count(), 2, "{output}");
    assert_eq!(output.matches("Connection: close").count(), 1, "{output}");

    // A server that stops ends the reading side, as `net::listen` does.
    let stop = |input: &str| {
        let (ours, mut client) = pair();
        client.write_all(input.as_bytes(), soon()).expect("written");
        ours.shutdown(Shutdown::Read);
        connection(ours).run(&Echo::default(), &AtomicBool::new(true));
        read_to_end(&mut client)
    };
    let output = stop(&GET.repeat(2));
    assert_eq!((output.matches("200 OK").count(), output.matches("Connection: close").count()), (1, 1), "{output}");
    assert!(stop("GET / HT").starts_with("HTTP/1.1 503 "));
    assert_eq!(stop(""), "");
}

#[test]
fn an_idle_connection_holds_little() {
    let (ours, mut client) = pair();
    let big = format!("GET /a HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "x".repeat(3 * IDLE_BYTES));
    client.write_all(big.as_bytes(), soon()).expect("written");
    client.shutdown(Shutdown::Write);
    let mut server = connection(ours);
    let end = server.converse(&Echo::default(), &AtomicBool::new(false));
    assert!(matches!(end, Ok(())), "{end:?}");
    assert!(server.buffer.capacity() <= IDLE_BYTES, "{}", server.buffer.capacity());
}

#[test]
fn busy_is_a_whole_response() {
    let responses = split(std::str::from_utf8(busy()).expect("text"));
    assert_eq!(responses.len(), 1);
    assert!(responses.iter().all(|(code, body)| code == "503" && body.starts_with('{') && body.ends_with("later\"}")), "{responses:?}");
    assert!(responses[0].1.contains("\"code\":\"too_many_connections\""), "{responses:?}");
}

/// What two ends of a TCP connection say, of which the client's is handed to `act`.
fn over_tcp(act: impl FnOnce(std::net::TcpStream) + Send) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let client = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
    let server = connection(Stream::Tcp(listener.accept().expect("a client").0));
    thread::scope(|scope| {
        scope.spawn(|| act(client));
        server.run(&Echo::default(), &AtomicBool::new(false));
    });
}

#[test]
fn a_handler_learns_that_its_client_left() {
    // Ends only when that is noticed.
    over_tcp(|mut client| std::io::Write::write_all(&mut client, b"GET /until-left HTTP/1.1\r\nHost: h\r\n\r\n").expect("written"));
}

#[test]
fn a_client_that_only_closed_its_sending_side_still_waits() {
    let answers = |request: &'static [u8]| {
        let (said, heard) = std::sync::mpsc::channel();
        over_tcp(move |mut client| {
            std::io::Write::write_all(&mut client, request).expect("written");
            client.shutdown(Shutdown::Write).expect("connected");
            let mut text = String::new();
            std::io::Read::read_to_string(&mut client, &mut text).expect("text");
            said.send(split(&text)).expect("heard");
        });
        heard.recv().expect("said")
    };
    let go_on = || ("100".to_owned(), String::new());
    let responses = answers(b"GET /looks/20 HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(responses, [go_on(), go_on(), ("200".into(), "0".into())]);
    // It cannot be asked, so it is not kept waiting.
    assert_eq!(answers(b"GET /until-left HTTP/1.0\r\n\r\n"), [("200".to_owned(), "over".to_owned())]);
}

#[test]
fn what_a_client_sends_meanwhile_is_answered_afterwards() {
    let responses = talk("GET /looks/2 HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\n");
    let responses: Vec<_> = split(&responses).into_iter().filter(|(code, _)| code != "100").collect();
    assert_eq!(responses, [("200".to_owned(), "0".to_owned()), ("200".to_owned(), "GET /a 0".to_owned())]);
}

/// xorshift64 (Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(sides).expect("small")).expect("small")
    }
}

#[test]
#[allow(clippy::print_stdout)] // The harness shows it when the test fails.
fn mangled_requests_get_whole_responses_or_none() {
    const SEEDS: [&str; 3] = [
        "GET /workloads/wl-1?follow&tail=10 HTTP/1.1\r\nHost: h:80\r\nAccept: */*\r\n\r\n",
        "POST /workloads HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\n{\"id\":\"wl\"}",
        "PUT /a%20b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nabcde\r\n0\r\nT: u\r\n\r\n",
    ];
    const BYTES: &[u8] = b"\r\n\0 \t:;,%/\\.+0179afxXGT\x7f\x80\xff";
    let seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
    println!("seed {seed:#x}");
    let mut dice = Dice(seed);
    let mut refused = 0;
    for round in 0..3000 {
        let mut input: Vec<u8> = (0..=dice.roll(3)).flat_map(|_| SEEDS.get(dice.roll(SEEDS.len())).expect("in range").bytes()).collect();
        for _ in 0..=dice.roll(4) {
            let at = dice.roll(input.len().max(1)).min(input.len());
            let byte = *BYTES.get(dice.roll(BYTES.len())).expect("in range");
            match (dice.roll(6), input.get_mut(at)) {
                (0, Some(old)) => *old ^= 1 << dice.roll(8),
                (1, Some(old)) => *old = byte,
                (2, Some(_)) => drop(input.remove(at)),
                (3, _) => input.truncate(at),
                (4, _) => input.splice(at..at, std::iter::repeat_n(byte, 1 + dice.roll(40))).for_each(drop),
                _ => input.extend_from_within(at..),
            }
        }
        let watch = Stopwatch::start();
        let output = split(&talk_with(&input, &Echo::default(), |server| server.read_bytes = 1 + dice.roll(200)));
        let (last, before) = output.split_last().map_or((None, &[][..]), |(last, before)| (Some(last), before));
        let context = || format!("seed {seed:#x}, round {round}: {:?} gives {output:?}", String::from_utf8_lossy(&input));
        assert!(before.iter().all(|(code, _)| code == "200"), "{}", context());
        assert!(last.is_none_or(|(code, _)| ["200", "400", "413", "417", "501", "505"].contains(&code.as_str())), "{}", context());
        assert!(watch.elapsed_ms() < 5000, "{}", context());
        refused += usize::from(last.is_some_and(|(code, _)| code != "200"));
    }
    // The canary: mangling that breaks nothing would test nothing.
    assert!(refused > 1000, "only {refused} of 3000 rounds were refused");
}
