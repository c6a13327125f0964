use super::*;

/// `head` of the bytes at once; a prefix must never say anything else than "more" or a refusal.
fn read(bytes: &[u8]) -> Result<Option<(usize, Head)>, Reject> {
    let whole = head(bytes);
    if whole.is_ok() {
        for end in 0..bytes.len() {
            match head(bytes.get(..end).unwrap_or_default()) {
                Ok(None) => {}
                early => assert_eq!(early, whole, "after {end} bytes of {:?}", String::from_utf8_lossy(bytes)),
            }
        }
    }
    whole
}

fn accept(text: &str) -> Head {
    match read(text.as_bytes()) {
        Ok(Some((used, head))) => {
            assert_eq!(used, text.find("\r\n\r\n").expect("an end") + 4, "{text:?}");
            head
        }
        other => panic!("{text:?}: {other:?}"),
    }
}

#[test]
fn every_broken_rule_is_refused_by_its_name() {
    // `|` is CRLF, `~` is a request line and a Host.
    let rows: &[(u16, Reject, &str)] = &[
        (400, Reject::BareLineFeed, "GET / HTTP/1.1\nHost: h||"),
        (400, Reject::BareLineFeed, "GET / HTTP/1.1|Host: h\n|"),
        (400, Reject::BareLineFeed, "GET / HTTP/1.1|Host: h|\n"),
        (400, Reject::BareLineFeed, "\n~|"),
        (400, Reject::BareLineFeed, "~X: y\n"),
        (413, Reject::BodyBytes, "~Content-Length: 524289||"),
        (413, Reject::BodyBytes, "~Content-Length: 18446744073709551615||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: chunked, gzip||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: chunked, chunked||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: chunked|Transfer-Encoding: chunked||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: gzip||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: identity||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding:||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: chunked,||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: xchunked||"),
        (400, Reject::CodingOrder, "~Transfer-Encoding: chunked;q=1||"),
        (501, Reject::CodingUnknown, "~Transfer-Encoding: gzip, chunked||"),
        (501, Reject::CodingUnknown, "~Transfer-Encoding: gzip|Transfer-Encoding: chunked||"),
        (501, Reject::CodingUnknown, "~Transfer-Encoding: , chunked||"),
        (400, Reject::CodingVersion, "POST / HTTP/1.0|Transfer-Encoding: chunked||"),
        (400, Reject::CodingWithLength, "~Content-Length: 4|Transfer-Encoding: chunked||"),
        (400, Reject::CodingWithLength, "~TRANSFER-ENCODING: x|content-length: 4||"),
        (400, Reject::CodingWithLength, "~Content-Length: 0|Transfer-Encoding:||"),
        (400, Reject::ContentLength, "~Content-Length: +4||"),
        (400, Reject::ContentLength, "~Content-Length: -4||"),
        (400, Reject::ContentLength, "~Content-Length: 0x4||"),
        (400, Reject::ContentLength, "~Content-Length: 4 4||"),
        (400, Reject::ContentLength, "~Content-Length: 4, 4||"),
        (400, Reject::ContentLength, "~Content-Length: 4.0||"),
        (400, Reject::ContentLength, "~Content-Length:||"),
        (400, Reject::ContentLength, "~Content-Length: 18446744073709551616||"),
        (417, Reject::Expectation, "~Expect: 200-ok||"),
        (417, Reject::Expectation, "~Expect: 100-continue, x||"),
        (400, Reject::HeaderFolded, "~X: a| b||"),
        (400, Reject::HeaderFolded, "~X: a|\tb: c||"),
        (400, Reject::HeaderFolded, "GET / HTTP/1.1| Host: h||"),
        (400, Reject::HeaderName, "~X||"),
        (400, Reject::HeaderName, "~: x||"),
        (400, Reject::HeaderName, "~X(: y||"),
        (400, Reject::HeaderName, "~X Y: z||"),
        (400, Reject::HeaderName, "~X\0: y||"),
        (400, Reject::HeaderName, "~Trénsfer-Encoding: y||"),
        (400, Reject::HeaderName, "~\r||"),
        (400, Reject::HeaderRepeated { name: "authorization" }, "~Authorization: a|authorization: b||"),
        (400, Reject::HeaderRepeated { name: "content-length" }, "~Content-Length: 4|Content-Length: 4||"),
        (400, Reject::HeaderRepeated { name: "content-length" }, "~Content-Length: 4|content-length: 5||"),
        (400, Reject::HeaderRepeated { name: "host" }, "~Host: h||"),
        (400, Reject::HeaderRepeated { name: "host" }, "GET / HTTP/1.0|hOST: i|Host: i||"),
        (400, Reject::HeaderSpace, "~X : y||"),
        (400, Reject::HeaderSpace, "GET / HTTP/1.1|Host : h||"),
        (400, Reject::HeaderSpace, "~Transfer-Encoding\t: chunked||"),
        (400, Reject::HeaderValue, "~X: a\0b||"),
        (400, Reject::HeaderValue, "~X: a\u{1}b||"),
        (400, Reject::HeaderValue, "~X: a\u{7f}b||"),
        (400, Reject::HeaderValue, "~X: a\rb||"),
        (400, Reject::HeaderValue, "~X: a\r||"),
        (400, Reject::HeaderValue, "~Transfer-Encoding: \u{b}chunked||"),
        (400, Reject::HostInvalid, "GET / HTTP/1.1|Host: a b||"),
        (400, Reject::HostInvalid, "GET / HTTP/1.1|Host: a, b||"),
        (400, Reject::HostInvalid, "GET / HTTP/1.1|Host: u@h/x||"),
        (400, Reject::HostMissing, "GET / HTTP/1.1||"),
        (400, Reject::HostMissing, "GET http://h/ HTTP/1.1|X: y||"),
        (501, Reject::Method, "BREW / HTTP/1.1|Host: h||"),
        (501, Reject::Method, "get / HTTP/1.1|Host: h||"),
        (501, Reject::Method, "CONNECT h:80 HTTP/1.1|Host: h||"),
        (501, Reject::Method, "TRACE / HTTP/1.1|Host: h||"),
        (501, Reject::Method, "SOMETHINGVERYLONG"),
        (400, Reject::PathSegment, "GET // HTTP/1.1|Host: h||"),
        (400, Reject::PathSegment, "GET /a/%2e%2E/b HTTP/1.1|Host: h||"),
        (400, Reject::RequestLine, "\x16\x03\x01\x02\0"),
        (400, Reject::RequestLine, " ~|"),
        (400, Reject::RequestLine, "GET  / HTTP/1.1||"),
        (400, Reject::RequestLine, "GET /||"),
        (400, Reject::RequestLine, "GET / ||"),
        (400, Reject::RequestLine, "GET / a HTTP/1.1||"),
        (400, Reject::RequestLine, "GET / HTTP/1.1 ||"),
        (400, Reject::RequestLine, "GET / HTTP/1.1\rHost: h||"),
        (400, Reject::RequestLine, "GET / http/1.1||"),
        (400, Reject::RequestLine, "GET / FTP/1.1||"),
        (400, Reject::RequestLine, "GET\t/ HTTP/1.1||"),
        (400, Reject::RequestLine, "GET /\u{1} HTTP/1.1||"),
        (400, Reject::RequestLine, "G\0T / HTTP/1.1||"),
        (400, Reject::TargetCharacter, "GET /a#b HTTP/1.1|Host: h||"),
        (400, Reject::TargetCharacter, "GET /é HTTP/1.1|Host: h||"),
        (400, Reject::TargetEncoding, "GET /%00 HTTP/1.1|Host: h||"),
        (400, Reject::TargetEncoding, "GET /?a=%zz HTTP/1.1|Host: h||"),
        (400, Reject::TargetForm, "GET * HTTP/1.1|Host: h||"),
        (400, Reject::TargetForm, "GET h:80 HTTP/1.1|Host: h||"),
        (505, Reject::Version, "GET / HTTP/2.0||"),
        (505, Reject::Version, "GET / HTTP/1.2||"),
        (505, Reject::Version, "GET / HTTP/0.9||"),
        (505, Reject::Version, "PRI * HTTP/2.0||SM||"),
        (505, Reject::Version, "GET / HTTP/11||"),
    ];
    for (code, reject, text) in rows {
        let text = text.replace('~', "POST / HTTP/1.1|Host: h|").replace('|', "\r\n");
        assert_eq!(read(text.as_bytes()), Err(*reject), "{text:?}");
        assert_eq!(reject.status().code(), *code, "{reject}");
    }
    assert_eq!(read(b"GET / HTTP/1.1\r\nHost: h\r\nX: \xff\r\n\r\n"), Err(Reject::HeaderValue), "not UTF-8");
}

#[test]
fn limits_hold_at_max_and_at_one_more() {
    let check = |text: String, over: Option<Reject>, code: u16| match (head(text.as_bytes()), over) {
        (Ok(Some((used, _))), None) => assert_eq!(used, text.len()),
        (Err(reject), Some(over)) => assert_eq!((reject, reject.status().code()), (over, code)),
        (other, over) => panic!("{} bytes: {other:?} instead of {over:?}", text.len()),
    };
    let target = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", "a".repeat(bytes - 1));
    check(target(HTTP_TARGET_BYTES_MAX), None, 200);
    check(target(HTTP_TARGET_BYTES_MAX + 1), Some(Reject::TargetBytes), 414);
    // A target that does not end is refused while it grows, and before what is wrong after it.
    check(format!("GET /{}", "a".repeat(HTTP_TARGET_BYTES_MAX)), Some(Reject::TargetBytes), 414);
    check(format!("GET /{} HTTP/9\r\n", "a".repeat(HTTP_TARGET_BYTES_MAX)), Some(Reject::TargetBytes), 414);

    let fill = |bytes: usize| {
        let frame = "GET / HTTP/1.1\r\nHost: h\r\nX: \r\n\r\n".len();
        format!("GET / HTTP/1.1\r\nHost: h\r\nX: {}\r\n\r\n", "x".repeat(bytes - frame))
    };
    check(fill(HTTP_HEAD_BYTES_MAX), None, 200);
    check(fill(HTTP_HEAD_BYTES_MAX + 1), Some(Reject::HeadBytes), 431);

    let count = |count: usize| format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "X: y\r\n".repeat(count - 1));
    check(count(HTTP_HEADERS_MAX), None, 200);
    check(count(HTTP_HEADERS_MAX + 1), Some(Reject::HeaderCount), 431);

    let length = |bytes: usize| format!("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: {bytes}\r\n\r\n");
    check(length(HTTP_BODY_BYTES_MAX), None, 200);
    check(length(HTTP_BODY_BYTES_MAX + 1), Some(Reject::BodyBytes), 413);
}

#[test]
fn a_head_says_what_follows_it() {
    let check = |text: &str, framing, expects_continue, keep_alive| {
        let head = accept(text);
        assert_eq!((head.framing, head.expects_continue, head.keep_alive), (framing, expects_continue, keep_alive), "{text:?}");
        assert_eq!(head.request.has_body_framing, framing != Framing::None, "{text:?}");
    };
    check("GET / HTTP/1.1\r\nHost: h\r\n\r\n", Framing::None, false, true);
    check("POST / HTTP/1.1\r\nHost:\r\n\r\n", Framing::None, false, true);
    check("POST / HTTP/1.1\r\nHost: [::1]:80\r\nContent-Length: 0\r\n\r\n", Framing::Length(0), false, true);
    check("GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 007\r\n\r\nrest\r\n\r\n", Framing::Length(7), false, true);
    check("PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \t CHUNKED \t\r\n\r\n", Framing::Chunked, false, true);
    check("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nExpect: 100-Continue\r\n\r\n", Framing::Length(1), true, true);
    check("PUT / HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n", Framing::Length(1), false, false);
    check("GET / HTTP/1.1\r\nHost: h\r\nConnection: x, Close\r\n\r\n", Framing::None, false, false);
    check("GET / HTTP/1.1\r\nHost: h\r\nConnection: x\r\nConnection: close\r\n\r\n", Framing::None, false, false);
    check("GET / HTTP/1.0\r\n\r\n", Framing::None, false, false);
    check("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", Framing::None, false, true);
    check("GET / HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n", Framing::None, false, false);
    // httparse trims what stands around a value.
    let request = accept("GET /a?b HTTP/1.1\r\nHost: h\r\nX-Y:  z \t\r\nx-y: 2\r\n\r\n").request;
    assert_eq!((request.header("X-y"), request.header("absent")), (Some("z"), None));
    assert_eq!(request.headers.len(), 3);
}

#[test]
fn blank_lines_are_counted_whole() {
    for (bytes, expect) in [("", 0), ("\r", 0), ("\r\n", 2), ("\r\n\r\n\r", 4), ("\n", 0), ("\r\nGET", 2), ("G\r\n", 0)] {
        assert_eq!(blank(bytes.as_bytes()), expect, "{bytes:?}");
    }
}

/// Decodes `bytes` given `step` at a time; what was not used is given again.
fn unchunk(bytes: &[u8], step: usize) -> Result<(Vec<u8>, Option<usize>), Reject> {
    let (mut chunks, mut body, mut held, mut used) = (Chunks::new(), Vec::new(), Vec::new(), 0);
    for piece in bytes.chunks(step) {
        held.extend_from_slice(piece);
        let n = chunks.decode(&held, &mut body)?;
        held.drain(..n);
        used += n;
    }
    Ok((body, chunks.is_over().then_some(used)))
}

#[test]
fn chunks_are_joined_however_they_arrive() {
    let rows = [
        ("0\r\n\r\n", ""),
        ("3\r\nabc\r\n0\r\n\r\n", "abc"),
        ("1\r\na\r\n0002\r\nbc\r\n000\r\n\r\n", "abc"),
        ("A\r\n0123456789\r\n0\r\n\r\n", "0123456789"),
        ("a;x=y;z=\"q\"\r\n0123456789\r\n0;last\r\n\r\n", "0123456789"),
        ("2 \t;x\r\n\r\n\r\n0\r\nA: b\r\nC:\r\n\r\n", "\r\n"),
    ];
    for (coded, expect) in rows {
        for tail in ["", "GET / HTTP/1.1\r\n"] {
            let bytes = [coded, tail].concat();
            for step in 1..=bytes.len() {
                let (body, used) = unchunk(bytes.as_bytes(), step).unwrap_or_else(|e| panic!("{bytes:?}: {e}"));
                assert_eq!((body.as_slice(), used), (expect.as_bytes(), Some(coded.len())), "{bytes:?} by {step}");
            }
        }
        for end in 0..coded.len() {
            let (_, over) =
                unchunk(coded.get(..end).unwrap_or_default().as_bytes(), coded.len()).unwrap_or_else(|e| panic!("{coded:?}: {e}"));
            assert_eq!(over, None, "{end} bytes of {coded:?}");
        }
    }
}

#[test]
fn bad_chunks_are_refused_by_the_rule_they_break() {
    let rows: &[(Reject, &[&str])] = &[
        (Reject::BareLineFeed, &["3\nabc\r\n0\r\n\r\n", "0\r\n\n", "0\n\r\n", "0\r\nA: b\n\r\n", "\n"]),
        (Reject::BodyBytes, &["80001\r\n", "ffffffffffffffff\r\n", "1\r\na\r\n80000\r\n"]),
        (Reject::ChunkEnd, &["3\r\nabcd\r\n0\r\n\r\n", "3\r\nabc\n0\r\n\r\n", "3\r\nabc0\r\n\r\n", "3\r\nabc\rx"]),
        (Reject::ChunkExtension, &["3;a\0b\r\nabc\r\n", "3;a\rb\r\nabc\r\n"]),
        (
            Reject::ChunkSize,
            &[
                "\r\n",
                "x\r\n",
                "+3\r\nabc\r\n",
                "-1\r\n",
                "0x3\r\nabc\r\n",
                " 3\r\nabc\r\n",
                "3 \r\nabc\r\n",
                "3 3\r\n",
                ";x\r\n",
                "3,\r\n",
                "10000000000000000\r\n",
                "00000000000000003\r\nabc\r\n",
            ],
        ),
        (Reject::HeaderName, &["0\r\nA\r\n\r\n", "0\r\n0\r\n\r\n"]),
        (Reject::HeaderValue, &["0\r\nA: \0\r\n\r\n", "0\r\nA: \rb\r\n\r\n"]),
    ];
    for (reject, texts) in rows {
        for text in *texts {
            for step in 1..=text.len() {
                assert_eq!(unchunk(text.as_bytes(), step), Err(*reject), "{text:?} by {step}");
            }
        }
    }
    for reject in [Reject::ChunkEnd, Reject::ChunkExtension, Reject::ChunkSize] {
        assert_eq!(reject.status(), Status::BadRequest);
    }
}

#[test]
fn chunk_limits_hold_at_max_and_at_one_more() {
    let check = |text: &str, expect: Result<(), Reject>| {
        for step in [1, 1000, text.len()] {
            assert_eq!(unchunk(text.as_bytes(), step).map(|(_, over)| assert_eq!(over, Some(text.len()))), expect, "by {step}");
        }
    };
    let extension = |bytes: usize| format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(bytes - 1));
    check(&extension(HTTP_CHUNK_EXTENSION_BYTES_MAX), Ok(()));
    check(&extension(HTTP_CHUNK_EXTENSION_BYTES_MAX + 1), Err(Reject::ChunkExtension));
    // Counted over all chunks: a byte of data in a kilobyte of extension does not pay.
    check(&format!("{}0\r\n\r\n", "1;x\r\na\r\n".repeat(HTTP_CHUNK_EXTENSION_BYTES_MAX / 2)), Ok(()));
    check(&format!("{}0\r\n\r\n", "1;x\r\na\r\n".repeat(HTTP_CHUNK_EXTENSION_BYTES_MAX / 2 + 1)), Err(Reject::ChunkExtension));
    check(&"1;".repeat(HTTP_CHUNK_EXTENSION_BYTES_MAX), Err(Reject::ChunkExtension));

    let trailer = |bytes: usize| format!("0\r\nA: b\r\nX:{}\r\n\r\n", "x".repeat(bytes - "A: b\r\nX:\r\n".len()));
    check(&trailer(HTTP_TRAILER_BYTES_MAX), Ok(()));
    check(&trailer(HTTP_TRAILER_BYTES_MAX + 1), Err(Reject::TrailerBytes));
    assert_eq!(Reject::TrailerBytes.status().code(), 431);

    let data = |bytes: usize| format!("1\r\na\r\n{:x}\r\n{}\r\n0\r\n\r\n", bytes - 1, "a".repeat(bytes - 1));
    check(&data(HTTP_BODY_BYTES_MAX), Ok(()));
    check(&data(HTTP_BODY_BYTES_MAX + 1), Err(Reject::BodyBytes));
}
