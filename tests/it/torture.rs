//! Everything that reads bytes from outside gets them mangled: cut off, split at every byte, repeated, flipped, swollen. It must
//! not panic, not hang, not exceed its limits, and not say one thing of a whole and another of its parts.
//!
//! The seed is new each time and is shown when something fails; `KAKURI_SEED=0x..` brings it back.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kakuri::agent::logs::{LogReader, More, Tail};
use kakuri::config;
use kakuri::cri::Client;
use kakuri::cri::proto::StatusResponse;
use kakuri::deadline::{Deadline, Stopwatch};
use kakuri::grpc::frame::Decoder;
use kakuri::http::parse::{self, Chunks};
use kakuri::limits;
use kakuri::net::Stream;
use kakuri::net::line::LineReader;
use kakuri::wire::agent::{LogRequest, Reply, Request};
use kakuri::wire::{containerd, docker, images, json};
use kakuri::workload::WorkloadId;
use serde_json::json;

use crate::harness::dice::Dice;
use crate::harness::{Dir, Http, Place, Plane, SOON_MS, brief, until, within};

/// Feeds mangled samples to `target`, which checks its own rules and panics when one is broken.
fn torture(rounds: usize, samples: &[&[u8]], target: impl FnMut(&mut Dice, &[u8])) {
    let hung = |words: &str| {
        // Nothing else ends a thread that hangs, and with it this test.
        let _ = writeln!(std::io::stderr(), "{words}"); // There is nobody else to tell.
        std::process::abort();
    };
    torture_for(2000, 60_000, hung, rounds, samples, target);
}

/// The same, with what a round may take, and what is done about one that takes so long that it will never end.
fn torture_for(
    round_ms: u64,
    hang_ms: u64,
    hung: impl Fn(&str) + Send,
    rounds: usize,
    samples: &[&[u8]],
    mut target: impl FnMut(&mut Dice, &[u8]),
) {
    let mut dice = Dice::new();
    let test = thread::current().name().unwrap_or_default().to_owned();
    let (begin, begun) = mpsc::channel::<(usize, Vec<u8>)>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut round = None;
            loop {
                match begun.recv_timeout(Duration::from_millis(hang_ms)) {
                    Ok(next) => round = Some(next),
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        let (round, input) = round.take().unwrap_or_default();
                        return hung(&format!("{test}: round {round} hangs over {}", brief(&String::from_utf8_lossy(&input))));
                    }
                }
            }
        });
        // Its end, be it a panic's, is the watchdog's.
        let begin = begin;
        for round in 0..rounds {
            let sample = samples[dice.below(samples.len())];
            let input = dice.mangle(sample);
            let _ = begin.send((round, input.clone())); // A watchdog that barked is gone.
            let watch = Stopwatch::start();
            target(&mut dice, &input);
            assert!(watch.elapsed_ms() < round_ms, "round {round} took {} ms for {} bytes", watch.elapsed_ms(), input.len());
        }
    });
}

const LINES: [&[u8]; 8] = [
    br#"{"type":"StartWorkload","workload":{"id":"wl-1","image":"busybox@sha256:aa","runtime_class":"gvisor","memory_mb":64,"cpu_millicores":500,"command":["sh","-c","exit 3"],"env":{"A":"b"},"labels":{"a":"b"},"ports":[{"container":80,"host":8080,"protocol":"udp"}],"mounts":[{"source":"/srv/a","target":"/a"}],"user":"1:2"},"wait_ms":5,"seq":7}"#,
    br#"{"type":"GetStatus","id":"wl-1","for":"terminal","wait_ms":1,"seq":"x"}"#,
    br#"{"type":"GetLogs","id":"wl-1","follow":false,"tail":3,"since":"2026-01-02T03:04:05.678Z","stream":"stderr"}"#,
    br#"{"type":"Exec","id":"wl-1","command":["uname","-r"],"timeout_ms":5}"#,
    br#"{"type":"ListWorkloads","after":"a","limit":7}"#,
    br#"{"type":"Ping"}"#,
    br#"{"type":"GetNode"}"#,
    br#"{"type":"DeleteWorkload","id":"wl-1","wait_ms":0}"#,
];

/// What a panic of `torture` says.
fn panic_of(torture: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(torture)).expect_err("the planted bug was not found");
    panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).expect("words")
}

/// Three targets that are each wrong in one way. All must be caught, and for what they are, or this whole file proves nothing.
#[test]
fn planted_bugs_are_found() {
    // A parser that believes a length it read.
    let trusting = |_: &mut Dice, bytes: &[u8]| {
        let announced = bytes.iter().find(|b| b.is_ascii_digit()).map_or(0, |digit| usize::from(digit - b'0'));
        let _ = &bytes[..announced];
    };
    let words = panic_of(|| torture(20_000, &LINES, trusting));
    assert!(words.contains("out of range"), "{words}");
    // One that is slow where objects are many.
    let is_hard = |bytes: &[u8]| bytes.iter().filter(|b| **b == b'{').count() > 10;
    let slow = |_: &mut Dice, bytes: &[u8]| {
        if is_hard(bytes) {
            within(200, || None::<()>);
        }
    };
    let words = panic_of(|| torture_for(150, 60_000, |words| panic!("{words}"), 20_000, &LINES, slow));
    assert!(words.contains(" took ") && words.contains(" ms for "), "{words}");
    // One that never comes back, until the watchdog lets it.
    let (said, is_released) = (Mutex::new(String::new()), AtomicBool::new(false));
    let bark = |words: &str| {
        words.clone_into(&mut said.lock().expect("not poisoned"));
        is_released.store(true, Ordering::SeqCst);
    };
    let hangs = |_: &mut Dice, bytes: &[u8]| {
        if is_hard(bytes) {
            until("the watchdog barks", || is_released.load(Ordering::SeqCst));
        }
    };
    torture_for(SOON_MS, 1000, bark, 20_000, &LINES, hangs);
    let said = said.into_inner().expect("not poisoned");
    assert!(said.contains("planted_bugs_are_found: round ") && said.contains(" hangs over "), "{said:?}");
}

#[test]
fn requests_of_the_line_protocol() {
    torture(20_000, &LINES, |_, bytes| {
        let received = Request::parse(bytes);
        assert!(received.id.is_none_or(|id| WorkloadId::new(&id).is_ok()));
        match received.request {
            // What is understood is said again in the same words.
            Ok(request) => assert_eq!(Request::parse(&request.to_line(None)).request, Ok(request)),
            Err(problems) => assert!((1..=limits::PROBLEMS_MAX).contains(&problems.as_slice().len())),
        }
    });
}

#[test]
fn json_is_as_strict_as_it_says() {
    torture(20_000, &LINES, |_, bytes| match (json::parse(bytes), serde_json::from_slice::<serde_json::Value>(bytes)) {
        (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs),
        (Ok(_), Err(error)) => panic!("taken, though {error}: {}", brief(&String::from_utf8_lossy(bytes))),
        (Err(_), _) => {}
    });
}

#[test]
fn replies_and_files_of_others() {
    let samples: [&[u8]; 5] = [
        br#"{"type":"Status","id":"a","state":"Running","status":{"reason":null,"message":null,"phase":null,"node":"n","attempt":0,"restarts":0,"exit_code":null,"oom_killed":false,"sandbox_id":null,"container_id":null,"image_digest":null,"ip":null,"handler":null,"isolation":{"verified":null,"handler":null,"kernel":null,"host_kernel":null,"message":null},"created_at":"2026-01-02T03:04:05.678Z","started_at":null,"finished_at":null,"observed_at":"2026-01-02T03:04:05.678Z","timings_ms":{"pull":null,"sandbox":null,"create":null,"start":null,"total":null},"placement":{"rejected":{}},"last_error":null}}"#,
        br#"{"type":"Log","stream":"stdout","time":"2026-01-02T03:04:05.678Z","line":"x"}"#,
        br#"{"auths":{"127.0.0.1:5000":{"auth":"YTpi"},"https://index.docker.io/v1/":{"username":"u","password":"p"}}}"#,
        br#"{"containerd":{"defaultRuntimeName":"runc","runtimes":{"runc":{"runtimeType":"x"},"gvisor":{}}}}"#,
        br#"{"version":1,"images":[{"endpoint":"/c.sock","id":"sha256:1","names":["r.test/a:1"],"credentials":["node"],"pulled_at":"2026-01-02T03:04:05.678Z","last_used_at":"2026-01-02T03:04:05.678Z"}]}"#,
    ];
    torture(20_000, &samples, |_, bytes| {
        let _ = images::Ledger::parse(bytes); // A damaged file is none.
        let _ = Reply::parse(bytes); // An agent that is out of its mind is an error, and no more.
        if let Ok(text) = std::str::from_utf8(bytes) {
            let _ = docker::credentials(text, &kakuri::workload::ImageRef::new("busybox").expect("valid"));
            let _ = containerd::handlers(text);
        }
    });
}

#[test]
fn lines_are_the_same_wherever_they_are_split() {
    let text = LINES.join(&b'\n');
    let read = |parts: &[&[u8]], bytes_max: usize| {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let all = parts.concat();
        let writer = thread::spawn({
            let parts: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
            move || parts.iter().try_for_each(|part| theirs.write_all(part))
        });
        let mut stream = Stream::Unix(ours);
        let mut reader = LineReader::new(bytes_max, 5000);
        let mut seen = Vec::new();
        let end = loop {
            match reader.next(&mut stream, Deadline::within_ms(5000, "test")) {
                Ok(Some(line)) => {
                    assert!(line.len() < bytes_max, "{} bytes", line.len());
                    seen.push(line.to_vec());
                }
                Ok(None) => break "end".to_owned(),
                Err(error) => break format!("{error:?}"),
            }
        };
        drop(stream);
        let _ = writer.join().expect("a writer"); // It may have been cut off.
        assert!(seen.concat().len() <= all.len());
        (seen, end)
    };
    torture(1500, &[&text, b"a\nb\r\n\n", b"x"], |dice, bytes| {
        let bytes_max = 1 + dice.below(2000);
        let whole = read(&[bytes], bytes_max);
        let at = dice.below(bytes.len() + 1);
        let split = read(&[&bytes[..at], &bytes[at..]], bytes_max);
        assert_eq!(whole, split, "split at {at} of {}", bytes.len());
    });
}

const REQUESTS: [&[u8]; 5] = [
    b"GET /workloads?state=Running&label=a%3Db&limit=7 HTTP/1.1\r\nHost: localhost:8080\r\nAccept: */*\r\nX-Request-Id: a-7\r\n\r\n",
    b"POST /workloads?wait_ms=1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 23\r\n\r\n{\"image\":\"a\",\"id\":\"wl\"}\n",
    b"POST /workloads/a/exec HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-T: a\r\n\r\n",
    b"HEAD http://x/v1/nodes HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
];

#[test]
fn an_http_head_is_the_same_however_it_comes() {
    torture(20_000, &REQUESTS, |dice, bytes| {
        let whole = parse::head(bytes);
        if let Ok(Some((used, head))) = &whole {
            assert!(*used <= bytes.len().min(limits::HTTP_HEAD_BYTES_MAX));
            assert!(head.request.headers.len() <= limits::HTTP_HEADERS_MAX);
            for segment in &head.request.segments {
                assert!(!segment.is_empty() && segment != "." && segment != ".." && !segment.contains(['/', '\\', '\0']), "{segment:?}");
            }
        }
        let at = dice.below(bytes.len() + 1);
        match parse::head(&bytes[..at]) {
            // Known early, known for good.
            Ok(None) => {}
            Ok(Some((used, head))) => assert_eq!(whole, Ok(Some((used, head))), "at {at}"),
            // Or it is not complete as a whole either, and will be refused when it is.
            Err(_) => {
                assert!(!matches!(whole, Ok(Some(_))), "refused at {at}, taken as a whole: {}", brief(&String::from_utf8_lossy(bytes)));
            }
        }
    });
}

#[test]
fn a_chunked_body_is_the_same_however_it_comes() {
    let decode = |parts: &[&[u8]]| {
        let (mut chunks, mut body, mut rest) = (Chunks::new(), Vec::new(), Vec::new());
        for part in parts {
            rest.extend_from_slice(part);
            let used = chunks.decode(&rest, &mut body).map_err(|reject| reject.to_string())?;
            rest.drain(..used);
            assert!(body.len() <= limits::HTTP_BODY_BYTES_MAX);
            if chunks.is_over() {
                break;
            }
        }
        Ok::<_, String>((body, chunks.is_over()))
    };
    let samples: [&[u8]; 3] = [
        b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-T: a\r\n\r\n",
        b"0\r\n\r\n",
        b"a\r\n0123456789\r\n000000000000000A;b\r\n0123456789\r\n0\r\n\r\n",
    ];
    torture(20_000, &samples, |dice, bytes| {
        let at = dice.below(bytes.len() + 1);
        let (whole, split) = (decode(&[bytes]), decode(&[&bytes[..at], &bytes[at..]]));
        // Refusals may differ in the rule, never in being one.
        assert_eq!(whole.clone().ok(), split.ok(), "split at {at}: {whole:?}");
    });
}

#[test]
fn grpc_frames_are_the_same_however_they_come() {
    let decode = |parts: &[&[u8]]| {
        let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
        for part in parts {
            decoder.push(part);
            loop {
                match decoder.take() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(error) => return (messages, Some(format!("{error:?}"))),
                }
            }
        }
        (messages, None)
    };
    let samples: [&[u8]; 2] = [b"\0\0\0\0\x05hello\0\0\0\0\0\0\0\0\0\x03abc", b"\0\x00\xff\xff\xff"];
    torture(20_000, &samples, |dice, bytes| {
        let at = dice.below(bytes.len() + 1);
        assert_eq!(decode(&[bytes]), decode(&[&bytes[..at], &bytes[at..]]), "split at {at}");
    });
}

#[test]
fn configuration_files() {
    let dir = Dir::new();
    let path = dir.join("config.toml");
    let example = |name: &str| fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name)).expect("an example");
    let (agent, plane) = (example("agent.toml"), example("control-plane.toml"));
    let args = |more: &[&str]| {
        let all = [&["--config", path.to_str().expect("UTF-8"), "--state-dir", "/x"][..], more].concat();
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    torture(1500, &[&agent, &plane], |_, bytes| {
        fs::write(&path, bytes).expect("written");
        let plane_args: Vec<String> = args(&[]).into_iter().map(|arg| arg.replace("--state-dir", "--data-dir")).collect();
        for error in [config::agent(&args(&[])).err(), config::control_plane(&plane_args).err()].into_iter().flatten() {
            let text = error.to_string();
            assert!(text.len() < 200_000 && !text.is_empty(), "{} bytes of error", text.len());
        }
    });
}

#[test]
fn logs_that_a_runtime_wrote() {
    let dir = Dir::new();
    let sample =
        b"2026-01-01T00:00:00.000000001Z stdout F one\n2026-01-01T02:00:00+02:00 stderr P half\n2026-01-01T00:00:01Z stderr F whole\n\
        2026-01-01T00:00:02Z stdout P:x tagged\n2026-01-01T00:00:02Z stdout F \nnonsense\n2026-01-01T00:00:03Z stdout F \xff\xfe\n";
    let request = || LogRequest { id: WorkloadId::new("a").expect("an id"), follow: false, tail: None, since: None, stream: None };
    let drain = |reader: &mut LogReader| {
        let mut lines = Vec::new();
        loop {
            let batch = reader.read().expect("a file");
            lines.extend(batch.lines);
            if batch.more == More::Later {
                return lines;
            }
        }
    };
    torture(1500, &[sample], |dice, bytes| {
        let file = dir.join("0.log");
        fs::write(&file, bytes).expect("written");
        let whole = drain(&mut LogReader::new(dir.join(""), &request()));
        let most = limits::LOG_LINE_BYTES_MAX + limits::LOG_RECORD_BYTES_MAX;
        // Three bytes stand for one that is no UTF-8.
        assert!(whole.iter().all(|line| line.line.len() <= 3 * most), "a line is longer than {most}");
        // As it grows, the same lines come, each once.
        let at = dice.below(bytes.len() + 1);
        fs::write(&file, &bytes[..at]).expect("written");
        let mut reader = LogReader::new(dir.join(""), &request());
        let mut grown = drain(&mut reader);
        fs::OpenOptions::new().append(true).open(&file).and_then(|mut file| file.write_all(&bytes[at..])).expect("written");
        grown.extend(drain(&mut reader));
        // A record that is too long to keep may be dropped in other places when it comes in parts.
        if bytes.split(|b| *b == b'\n').all(|record| record.len() < limits::LOG_RECORD_BYTES_MAX) {
            assert_eq!(grown, whole, "split at {at} of {}", bytes.len());
        }
        let mut tail = Tail::new(2);
        tail.push(whole.clone());
        assert_eq!(tail.into_lines().collect::<Vec<_>>(), whole[whole.len().saturating_sub(2)..]);
    });
}

/// What a runtime answers to one call, byte for byte, so that it can be played back.
fn record(place: &Place) -> Vec<u8> {
    let path = place.dir.join("record.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let real = place.endpoint().to_owned();
    let relay = thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("a client");
        let mut server = UnixStream::connect(real).expect("the runtime");
        let (mut from_client, mut to_server) = (client.try_clone().expect("a descriptor"), server.try_clone().expect("a descriptor"));
        let up = thread::spawn(move || {
            let _ = std::io::copy(&mut from_client, &mut to_server); // To the end, however it comes.
            let _ = to_server.shutdown(std::net::Shutdown::Both);
        });
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = server.read(&mut buffer) {
            all.extend_from_slice(&buffer[..n]);
            if client.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = client.shutdown(std::net::Shutdown::Both); // Ends the other direction.
        up.join().expect("a thread");
        all
    });
    let client = Client::new(path);
    client.status(true, Deadline::within_ms(9000, "test")).expect("the runtime answers");
    drop(client);
    relay.join().expect("a thread")
}

/// A runtime that gives every request the same answer, whatever it was told to give.
struct Player {
    path: PathBuf,
    /// In pieces; the connection is closed after the last.
    answer: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: thread::JoinHandle<()>,
}

impl Player {
    fn start(path: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).expect("a socket");
        let answer = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let shared = Arc::clone(&answer);
        let thread = thread::spawn(move || {
            loop {
                let (mut client, _) = listener.accept().expect("a client");
                // A client that says nothing is how it is told to stop.
                if read_request(&mut client).is_none() {
                    return;
                }
                let pieces = shared.lock().expect("not poisoned").clone();
                let _ = pieces.iter().try_for_each(|piece| client.write_all(piece)); // It may have had enough.
            }
        });
        Self { path, answer, thread }
    }

    /// One call that gets this answer. It may be repeated, so a connection that breaks is tried twice more.
    fn call(&self, pieces: &[&[u8]]) -> Result<StatusResponse, kakuri::grpc::Error> {
        *self.answer.lock().expect("not poisoned") = pieces.iter().map(|piece| piece.to_vec()).collect();
        let watch = Stopwatch::start();
        let result = Client::new(self.path.clone()).status(true, Deadline::within_ms(1500, "test"));
        assert!(watch.elapsed_ms() < 4000, "{} ms", watch.elapsed_ms());
        result
    }

    fn stop(self) {
        drop(UnixStream::connect(&self.path));
        self.thread.join().expect("a thread");
    }
}

/// Reads frames up to the one that ends the request (RFC 9113 section 4.1: length, type, flags, stream).
fn read_request(client: &mut UnixStream) -> Option<()> {
    client.read_exact(&mut [0; 24]).ok()?;
    loop {
        let mut head = [0; 9];
        client.read_exact(&mut head).ok()?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        client.read_exact(&mut payload).ok()?;
        if head[3] == 0 && head[4] & 1 == 1 {
            return Some(());
        }
    }
}

#[test]
fn answers_of_a_runtime() {
    let place = Place::sim(&["--no-events"]);
    let good = record(&place);
    assert!(good.len() > 100, "{} bytes", good.len());
    let player = Player::start(place.dir.join("player.sock"));
    // Split at every byte: the same answer.
    for at in 0..good.len() {
        let answer = player.call(&[&good[..at], &good[at..]]).unwrap_or_else(|error| panic!("split at {at}: {error:?}"));
        assert!(answer.runtime_handlers.len() > 3, "split at {at}");
    }
    // Cut off at every byte: no answer before the one byte that completes it.
    let answered: Vec<bool> = (0..=good.len()).map(|at| player.call(&[&good[..at]]).is_ok()).collect();
    let first = answered.iter().position(|answered| *answered).expect("the whole is an answer");
    assert!(first > good.len() / 2 && answered[first..].iter().all(|answered| *answered), "{first} of {}", good.len());
    // Mangled: anything but a panic, a hang, or more memory than a message may take.
    let mut dice = Dice::new();
    for _ in 0..300 {
        let answer = dice.mangle(&good);
        let _ = player.call(&[&answer]); // An error, or by chance none.
    }
    player.stop();
}

#[test]
fn daemons_that_listen() {
    let place = Place::sim(&[]);
    let mut agent = place.agent(&[]);
    let mut plane = Plane::start(&place, &[&agent], &[]);
    let mut dice = Dice::new();
    for round in 0..150 {
        let mut line = agent.line();
        let sample = LINES[dice.below(LINES.len())];
        let input = dice.mangle(&[sample, b"\n"].concat());
        let _ = line.try_send(&input);
        line.end();
        // Whatever it was, each line got an answer that is one, and then the end came.
        while line.next().is_some() {}
        let mut http = plane.http();
        let sample = REQUESTS[dice.below(REQUESTS.len())];
        let input = dice.mangle(sample);
        let _ = http.try_send(&input);
        http.end();
        read_all(&mut http, &input);
        assert_eq!(plane.get("/livez").status, 200, "round {round}");
    }
    for (name, kib) in [("agent", agent.daemon().resident_kib()), ("control plane", plane.daemon().resident_kib())] {
        assert!(kib < 64 * 1024, "{name}: {kib} KiB");
    }
    for log in ["agent.log", "plane.log"] {
        let log = fs::read_to_string(place.dir.join(log)).expect("a log");
        assert!(!log.contains("panicked"), "{log}");
    }
    assert_eq!(agent.ask(&json!({"type": "Ping"})), Reply::Pong { version: env!("CARGO_PKG_VERSION").into() });
}

/// Reads responses to the end; which of them have bodies depends on the requests, so only their bytes are looked at.
fn read_all(http: &mut Http, input: &[u8]) {
    let bytes = http.rest();
    let text = String::from_utf8_lossy(&bytes);
    assert!(bytes.is_empty() || text.starts_with("HTTP/1.1 "), "{}: {}", brief(&String::from_utf8_lossy(input)), brief(&text));
    assert!(!text.contains("HTTP/1.1 500"), "{}: {}", brief(&String::from_utf8_lossy(input)), brief(&text));
}
