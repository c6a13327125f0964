//! Many small requests: how many a second, and how long each takes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use kakuri::cri::Client;
use kakuri::deadline::{Deadline, Stopwatch};

use crate::Failure;
use crate::relay::{self, Frame, Frames};

/// Durations, and the time in which all of them passed.
#[derive(Default)]
pub(crate) struct Sample {
    each: Vec<Duration>,
    all: Duration,
}

impl Sample {
    /// Those of several clients at once, and the time in which all of them passed.
    pub(crate) fn of(each: Vec<Duration>, all: Duration) -> Self {
        Self { each, all }
    }

    /// Adds one that was taken alone.
    pub(crate) fn add(&mut self, one: Duration) {
        self.each.push(one);
        self.all += one;
    }

    /// Adds another sample, taken later.
    pub(crate) fn append(&mut self, other: Self) {
        self.each.extend(other.each);
        self.all += other.all;
    }

    /// The smallest duration that so many percent do not exceed; zero when there is none.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.each.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100);
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// How many passed in a second.
    #[allow(clippy::cast_precision_loss)] // Counts are far below 2^52.
    pub(crate) fn per_second(&self) -> f64 {
        self.each.len() as f64 / self.all.as_secs_f64().max(1e-9)
    }
}

/// A protocol of requests and replies in turn.
#[derive(Clone, Copy)]
pub(crate) enum Protocol {
    /// HTTP/1.1 with keep-alive and `Content-Length`.
    Http,
    /// A line each.
    Line,
}

/// Sends the same request again and again, over so many connections at once.
///
/// # Errors
/// When a connection fails, or a reply does not begin with `expect`.
pub(crate) fn tcp(
    address: SocketAddr,
    protocol: Protocol,
    request: &[u8],
    expect: &[u8],
    connections: usize,
    total: usize,
) -> Result<Sample, Failure> {
    let barrier = Barrier::new(connections + 1);
    let connect = || {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        io::Result::Ok(BufReader::new(stream))
    };
    let each = total.div_ceil(connections);
    let run = || -> Result<Vec<Duration>, Failure> {
        let stream = connect();
        barrier.wait();
        let mut stream = stream?;
        let (mut reply, mut times) = (Vec::new(), Vec::with_capacity(each));
        for _ in 0..each {
            let watch = Stopwatch::start();
            stream.get_mut().write_all(request)?;
            read_reply(&mut stream, protocol, &mut reply)?;
            times.push(watch.elapsed());
            if !reply.starts_with(expect) {
                return Err(format!("unexpected reply {:?}", String::from_utf8_lossy(&reply)).into());
            }
        }
        Ok(times)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(run)).collect();
        barrier.wait();
        let watch = Stopwatch::start();
        let mut sample = Sample::default();
        for thread in threads {
            sample.each.extend(thread.join().expect("no panic in a client")?);
        }
        sample.all = watch.elapsed();
        Ok(sample)
    })
}

/// Reads one reply.
///
/// # Errors
/// The socket's; a reply that ends early, or an HTTP response without a length.
pub(crate) fn read_reply(stream: &mut BufReader<TcpStream>, protocol: Protocol, reply: &mut Vec<u8>) -> Result<(), Failure> {
    reply.clear();
    match protocol {
        Protocol::Line => {
            stream.read_until(b'\n', reply)?;
            if reply.pop() != Some(b'\n') {
                return Err("the agent closed the connection".into());
            }
        }
        Protocol::Http => {
            let mut length = 0;
            loop {
                let begin = reply.len();
                if stream.read_until(b'\n', reply)? == 0 {
                    return Err("the control plane closed the connection".into());
                }
                let line = reply.get(begin..).unwrap_or_default().trim_ascii();
                if line.is_empty() {
                    break;
                }
                if let Some(value) = line.strip_prefix(b"Content-Length: ") {
                    length = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()).ok_or("no Content-Length")?;
                }
            }
            let head = reply.len();
            reply.resize(head + length, 0);
            stream.read_exact(reply.get_mut(head..).unwrap_or_default())?;
        }
    }
    Ok(())
}

/// `Version` calls, by so many threads over one channel.
///
/// # Errors
/// That of a call.
pub(crate) fn version(client: &Client, threads: usize, total: usize) -> Result<Sample, Failure> {
    let barrier = Barrier::new(threads + 1);
    let each = total.div_ceil(threads);
    let run = || -> Result<Vec<Duration>, Failure> {
        let call = || client.version(Deadline::within_ms(10_000, "bench"));
        // A connection for each, made before the clock runs.
        let first = call();
        barrier.wait();
        first?;
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let watch = Stopwatch::start();
            call()?;
            times.push(watch.elapsed());
        }
        Ok(times)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        barrier.wait();
        let watch = Stopwatch::start();
        let mut sample = Sample::default();
        for thread in threads {
            sample.each.extend(thread.join().expect("no panic in a caller")?);
        }
        sample.all = watch.elapsed();
        Ok(sample)
    })
}

/// The least a `Version` call can cost: the same request packed by hand, on a bare socket, with no library in between.
///
/// # Errors
/// The socket's; an answer that is no message.
pub(crate) fn version_by_hand(socket: &Path, total: usize) -> Result<Sample, Failure> {
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap_or_default().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    const PING: u8 = 6;
    const ACK: u8 = 1;
    const END_HEADERS: u8 = 4;
    // A Go server measures the way with one of these in each call, and goes on as soon as it is acknowledged.
    const GO_PING: [u8; 8] = [2, 4, 16, 16, 9, 14, 7, 7];
    // HPACK's plainest form: a literal, not indexed, not compressed (RFC 7541 section 6.2.2).
    let field = |name: &str, value: &str| {
        let length = |text: &str| u8::try_from(text.len()).unwrap_or_default();
        [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
    };
    let headers = [
        field(":method", "POST"),
        field(":scheme", "http"),
        field(":authority", "localhost"),
        field(":path", "/runtime.v1.RuntimeService/Version"),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
        field("grpc-timeout", "10000m"),
    ]
    .concat();
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // Credit for all answers to come, so that the server never waits for us.
    let credit = frame(WINDOW_UPDATE, 0, 0, &0x3fff_ffff_u32.to_be_bytes());
    stream.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(SETTINGS, 0, 0, &[]), &credit].concat())?;
    let (mut frames, mut buffer, mut sample) = (Frames::default(), [0; 16 * 1024], Sample::default());
    for id in (1..).step_by(2).take(total) {
        let watch = Stopwatch::start();
        let message = [0, 0, 0, 0, 4, 0x0a, 2, b'v', b'1'];
        stream
            .write_all(&[frame(relay::HEADERS, END_HEADERS, id, &headers), frame(relay::DATA, relay::END_STREAM, id, &message)].concat())?;
        let (mut is_over, mut is_answered, mut pings) = (false, false, 0);
        while !is_over {
            let read = stream.read(&mut buffer)?;
            frames.push(&buffer[..read], &mut |frame: &Frame| {
                is_answered |= frame.kind == relay::DATA && frame.length > 5;
                is_over |= frame.kind == relay::HEADERS && frame.flags & relay::END_STREAM != 0;
                pings += usize::from(frame.kind == PING && frame.flags & ACK == 0);
            });
            is_over |= read == 0;
        }
        stream.write_all(&frame(PING, ACK, 0, &GO_PING).repeat(pings))?;
        if !is_answered {
            return Err("no answer to a Version call packed by hand".into());
        }
        sample.add(watch.elapsed());
    }
    Ok(sample)
}

/// What the machine itself needs for a question and an answer: 64 bytes there and back between two threads.
///
/// # Errors
/// Those of the sockets.
pub(crate) fn ping_pong(total: usize) -> Result<Sample, Failure> {
    let (mut near, mut far) = UnixStream::pair()?;
    let echo = thread::spawn(move || {
        let mut buffer = [0; 64];
        while far.read_exact(&mut buffer).and_then(|()| far.write_all(&buffer)).is_ok() {}
    });
    let mut sample = Sample::default();
    let mut buffer = [0; 64];
    for _ in 0..total {
        let watch = Stopwatch::start();
        near.write_all(&buffer)?;
        near.read_exact(&mut buffer)?;
        sample.add(watch.elapsed());
    }
    drop(near);
    let _ = echo.join(); // It has nothing to say.
    Ok(sample)
}
