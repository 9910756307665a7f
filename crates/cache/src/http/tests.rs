//! Against a server that fails as it is told. Real servers and real Nix are in the peers tests.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use drover_nix::signature::SecretKey;
use drover_nix::{NarInfo, StorePath, narinfo::Compression};

use super::*;
use crate::compression::tests::compress;
use crate::testing::{Fault, Server, State, info_of, nar_of_file, spool, store_path};
use crate::{Cache, Credentials, Secret, Stored, VerifiedNar};

fn options() -> CacheOptions {
    CacheOptions { attempts: 3, stall_timeout: Duration::from_secs(20), ..CacheOptions::default() }
}

fn cache(server: &Server) -> BinaryCache<Http> {
    open(&server.url, &options()).unwrap()
}

/// Puts a file of these contents, under this name, into the cache.
fn put(cache: &dyn Cache, name: &str, contents: &[u8]) -> StorePath {
    let nar = nar_of_file(contents);
    let info = info_of(name, &nar);
    assert_eq!(cache.put(&info, &spool(&nar)).unwrap(), Stored::New);
    info.path
}

fn get(cache: &dyn Cache, path: &StorePath) -> io::Result<Vec<u8>> {
    let narinfo = cache.narinfo(path).map_err(io::Error::other)?.unwrap();
    let mut bytes = Vec::new();
    let nar = cache.nar(&narinfo).map_err(io::Error::other)?;
    VerifiedNar::new(nar, &narinfo.info).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Does not compress, so that it stays as long as it is.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(step).collect()
}

#[test]
fn the_narinfo_file_comes_last_and_nothing_is_sent_twice() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", b"hello");
    let requests = server.requests();
    let puts: Vec<&String> = requests.iter().filter(|request| request.starts_with("PUT")).collect();
    assert_eq!(puts.len(), 3, "{requests:?}");
    assert!(puts[0].ends_with("nix-cache-info") && puts[1].contains("nar/") && puts[2].ends_with(".narinfo"));
    assert_eq!(server.lock().files["nix-cache-info"], b"StoreDir: /nix/store\n");
    assert_eq!(get(&cache, &path).unwrap(), nar_of_file(b"hello"));
    server.requests();
    let nar = nar_of_file(b"hello");
    assert!(matches!(cache.put(&info_of("x", &nar), &spool(&nar)).unwrap(), Stored::Already(_)));
    // Another path with the same content: its NAR is there.
    put(&cache, "y", b"hello");
    let requests = server.requests();
    let puts: Vec<&String> = requests.iter().filter(|request| request.starts_with("PUT")).collect();
    assert_eq!(puts, [&format!("PUT {}.narinfo", store_path("y").hash_part())]);
    assert_eq!(cache.narinfo(&store_path("absent")).unwrap(), None);
}

#[test]
fn what_is_there_stays_and_gains_signatures() {
    let server = Server::start();
    let cache = cache(&server);
    let nar = nar_of_file(b"first");
    let mut info = info_of("x", &nar);
    cache.put(&info, &spool(&nar)).unwrap();
    let other = nar_of_file(b"second");
    let Stored::Already(there) = cache.put(&info_of("x", &other), &spool(&other)).unwrap() else {
        panic!("the second NAR took the first one's place");
    };
    assert_eq!(there.info.nar_hash, info.nar_hash);
    let key = SecretKey::from_seed("k-1", &[5; 32]).unwrap();
    info.signatures.push(key.sign(info.fingerprint(&options().dir).as_bytes()));
    cache.put(&info, &spool(&nar)).unwrap();
    let strict = CacheOptions { public_keys: vec![key.public()], ..options() };
    assert!(open(&server.url, &strict).unwrap().narinfo(&info.path).unwrap().is_some());
    let unsigned = put(&cache, "unsigned", b"x");
    let error = open(&server.url, &strict).unwrap().narinfo(&unsigned).unwrap_err();
    assert_eq!(error.category(), "untrusted");
    // The NAR of another object.
    assert_eq!(cache.put(&info, &spool(&other)).unwrap_err().category(), "content");
}

#[test]
fn failures_that_pass_are_waited_out() {
    let server = Server::start();
    let cache = cache(&server);
    server.lock().faults.extend([Fault::Status(503), Fault::Hangup]);
    let path = put(&cache, "x", b"hello");
    server.lock().faults.extend([Fault::Hangup, Fault::Status(500)]);
    assert!(cache.narinfo(&path).unwrap().is_some());
    server.lock().faults.extend([Fault::Status(502), Fault::Status(502), Fault::Status(502)]);
    let error = cache.narinfo(&path).unwrap_err();
    assert!(matches!(error, Error::Status { status: 502, .. }) && error.is_transient(), "{error}");
}

#[test]
fn failures_that_stay_are_not_repeated() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", b"hello");
    server.requests();
    for (status, missing) in [(401, false), (400, false), (403, true), (410, true)] {
        server.lock().faults.push_back(Fault::Status(status));
        match cache.narinfo(&path) {
            Ok(None) => assert!(missing, "{status}"),
            Err(error) => assert!(!missing && !error.is_transient(), "{status}: {error}"),
            Ok(Some(_)) => panic!("{status} is an answer"),
        }
        assert_eq!(server.requests().len(), 1, "{status}");
    }
    // Nobody listens: told, and soon.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = open(&url, &options()).unwrap().narinfo(&path).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_body_that_breaks_off_is_taken_up_again() {
    let server = Server::start();
    let cache = cache(&server);
    let contents = noise(300_000);
    let path = put(&cache, "x", &contents);
    for ranges in [true, false] {
        server.lock().ranges = ranges;
        server.lock().faults.extend([Fault::Truncate(100_000), Fault::Truncate(50_000)]);
        server.requests();
        assert!(get(&cache, &path).unwrap() == nar_of_file(&contents));
        assert!(server.lock().faults.is_empty());
        let requests = server.requests();
        assert!(requests.iter().any(|request| request.ends_with("bytes=100000-")), "{requests:?}");
    }
    // Another part than the rest is not taken for it.
    server.lock().ranges = true;
    server.lock().whole_part = true;
    server.lock().faults.push_back(Fault::Truncate(100_000));
    let error = get(&cache, &path).unwrap_err().to_string();
    assert!(error.contains("another part"), "{error}");
    server.lock().whole_part = false;
    // Not for ever.
    server.lock().faults.extend(vec![Fault::Truncate(0); 20]);
    assert!(get(&cache, &path).is_err());
    server.lock().faults.clear();
}

/// A file that is another one meanwhile is not glued to the beginning of the first.
#[test]
fn a_file_that_changes_is_noticed() {
    let server = Server::start();
    let cache = cache(&server);
    let contents = noise(300_000);
    let path = put(&cache, "x", &contents);
    let narinfo = cache.narinfo(&path).unwrap().unwrap();
    let name = narinfo.url.clone();
    let date = |day: u8| format!("last-modified: Mon, 0{day} Jan 2024 00:00:00 GMT\r\n");
    for (before, after, longer, noticed) in [
        ("etag: \"one\"\r\n".to_owned(), "etag: \"two\"\r\n".to_owned(), false, true),
        (date(1), date(2), false, true),
        (String::new(), String::new(), true, true),
        // A weak tag promises nothing, and what changes it may not be the bytes.
        ("etag: W/\"one\"\r\n".to_owned(), "etag: W/\"two\"\r\n".to_owned(), false, false),
        (date(1), date(1), false, false),
    ] {
        let file = server.lock().files[&name].clone();
        for ranges in [true, false] {
            server.lock().ranges = ranges;
            server.lock().headers.insert(name.clone(), before.clone());
            server.lock().faults.push_back(Fault::Truncate(100_000));
            let mut body = cache.nar(&narinfo).unwrap();
            let mut read = vec![0; 50_000];
            body.read_exact(&mut read).unwrap();
            server.lock().headers.insert(name.clone(), after.clone());
            if longer {
                server.lock().files.insert(name.clone(), [&file[..], b"more"].concat());
            }
            match body.read_to_end(&mut read) {
                Ok(_) => assert!(!noticed && read == nar_of_file(&contents), "{before} {after} {ranges}"),
                Err(error) => {
                    assert!(noticed && error.to_string().contains("changed"), "{before} {after}: {error}")
                }
            }
            server.lock().files.insert(name.clone(), file.clone());
            server.lock().faults.clear();
        }
    }
}

#[test]
fn a_body_that_is_longer_than_announced_is_cut() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", &noise(300_000));
    server.lock().faults.extend(vec![Fault::Understate(1000); 3]);
    assert!(get(&cache, &path).is_err(), "the end is missing");
    server.lock().faults.clear();
    // What came too much is not taken for the next answer.
    assert!(get(&cache, &path).unwrap() == nar_of_file(&noise(300_000)));
}

#[test]
fn a_server_that_asks_for_time_gets_it() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", b"hello");
    let name = format!("{}.narinfo", path.hash_part());
    server.lock().headers.insert(name, "retry-after: 1\r\n".into());
    server.lock().faults.push_back(Fault::Status(429));
    let start = Instant::now();
    assert!(cache.narinfo(&path).unwrap().is_some());
    assert!(start.elapsed() >= Duration::from_secs(1));
}

/// A directory that somebody serves, without a word about itself.
#[test]
fn a_cache_that_does_not_say_of_which_store_it_is() {
    let server = Server::start();
    let path = put(&cache(&server), "x", b"hello");
    server.lock().files.remove("nix-cache-info");
    let reader = cache(&server);
    server.requests();
    for _ in 0..3 {
        assert_eq!(get(&reader, &path).unwrap(), nar_of_file(b"hello"));
    }
    let asked = server.requests().iter().filter(|request| request.contains("nix-cache-info")).count();
    assert_eq!(asked, 1);
    // Each narinfo file says it, too.
    let name = format!("{}.narinfo", path.hash_part());
    let text = String::from_utf8(server.lock().files[&name].clone()).unwrap();
    server.lock().files.insert(name, text.replace("/nix/store", "/gnu/store").into_bytes());
    assert_eq!(reader.narinfo(&path).unwrap_err().category(), "format");
    // Whoever stores says it, even if it only read before.
    put(&reader, "y", b"more");
    assert!(server.lock().files.contains_key("nix-cache-info"));
    // What a cache thinks of its own rank is no matter.
    let info = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 10\n";
    server.lock().files.insert("nix-cache-info".into(), info.to_vec());
    assert_eq!(cache(&server).narinfo(&store_path("absent")).unwrap(), None);
    server.lock().files.insert("nix-cache-info".into(), b"Priority: 10\n".to_vec());
    assert_eq!(cache(&server).narinfo(&path).unwrap_err().category(), "store-dir");
}

#[test]
fn a_body_that_stands_still_is_given_up() {
    let server = Server::start();
    let short = CacheOptions { stall_timeout: Duration::from_millis(300), ..options() };
    let cache = open(&server.url, &short).unwrap();
    let contents = noise(300_000);
    let path = put(&cache, "x", &contents);
    server.lock().faults.push_back(Fault::Stall(100_000));
    assert!(get(&cache, &path).unwrap() == nar_of_file(&contents));
    server.lock().faults.extend(vec![Fault::Stall(0); 20]);
    let start = Instant::now();
    assert!(get(&cache, &path).is_err());
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[test]
fn what_a_hostile_cache_says_is_refused() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", b"hello");
    let name = format!("{}.narinfo", path.hash_part());
    let good = String::from_utf8(server.lock().files[&name].clone()).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        server.lock().files.insert(name.clone(), good.replacen(from, to, 1).into_bytes());
    };
    with("-x\n", "-y\n");
    assert_eq!(cache.narinfo(&path).unwrap_err().category(), "wrong-path");
    with("NarSize", "NarSice");
    assert_eq!(cache.narinfo(&path).unwrap_err().category(), "format");
    for (url, category) in [
        ("URL: ../secret", "format"),
        ("URL: /etc/passwd", "format"),
        ("URL: file:///etc/passwd", "format"),
        ("URL: other:thing", "format"),
        ("URL: absent", "missing-nar"),
    ] {
        with(good.lines().find(|line| line.starts_with("URL: ")).unwrap(), url);
        let narinfo = cache.narinfo(&path).unwrap().unwrap();
        let Err(error) = cache.nar(&narinfo) else { panic!("{url} was opened") };
        assert_eq!(error.category(), category, "{url}: {error}");
    }
    with("Compression: zstd", "Compression: br");
    let narinfo = cache.narinfo(&path).unwrap().unwrap();
    assert!(matches!(
        cache.nar(&narinfo),
        Err(Error::Compression { compression: Compression::Other("br"), .. })
    ));
    server.lock().files.insert(name.clone(), vec![b'x'; (2 << 20) + 1]);
    assert_eq!(cache.narinfo(&path).unwrap_err().category(), "too-large");
    // Of another store. A fresh handle: this one has asked already.
    server.lock().files.insert(name, good.into_bytes());
    server.lock().files.insert("nix-cache-info".into(), b"StoreDir: /gnu/store\n".to_vec());
    let error = open(&server.url, &options()).unwrap().narinfo(&path).unwrap_err();
    assert_eq!(error.category(), "store-dir");
}

#[test]
fn encoded_files_and_full_urls() {
    let server = Server::start();
    let cache = cache(&server);
    let path = put(&cache, "x", b"hello");
    let name = format!("{}.narinfo", path.hash_part());
    let mut text = String::from_utf8(server.lock().files[&name].clone()).unwrap();
    text = text.replace("URL: ", &format!("URL: {}/", server.url));
    for encoding in
        [Compression::Gzip, Compression::Bzip2, Compression::Xz, Compression::Zstd, Compression::None]
    {
        server.lock().files.insert(name.clone(), compress(encoding, text.as_bytes()));
        server.lock().headers.insert(name.clone(), format!("content-encoding: {encoding}\r\n"));
        assert_eq!(get(&cache, &path).unwrap(), nar_of_file(b"hello"), "{encoding}");
    }
    server.lock().headers.insert(name, "content-encoding: br\r\n".into());
    let error = cache.narinfo(&path).unwrap_err();
    assert!(error.to_string().contains("Content-Encoding"), "{error}");
}

#[test]
fn logs() {
    let server = Server::start();
    let cache = cache(&server);
    let drv = store_path("x.drv");
    assert!(cache.log(&drv).unwrap().is_none());
    server.lock().faults.push_back(Fault::Status(503));
    cache.put_log(&drv, &mut &b"line 1\nline 2\n"[..]).unwrap();
    assert_eq!(server.lock().files[&format!("log/{drv}")], b"line 1\nline 2\n");
    let mut log = String::new();
    cache.log(&drv).unwrap().unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(log, "line 1\nline 2\n");
}

#[test]
fn who_asks() {
    let server = Server::start();
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let path = store_path("x");
    let basic = Credentials::Basic { user: "me".into(), password: Secret::new("pass:w\u{f6}rd") };
    let netrc = |text: &str| Credentials::Netrc(Secret::new(text));
    let in_url = format!("http://me:p%3Ass@127.0.0.1:{port}");
    for (url, credentials, wanted) in [
        (&server.url, basic.clone(), "Basic bWU6cGFzczp3w7ZyZA=="),
        (&server.url, Credentials::Bearer(Secret::new("t0ken")), "Bearer t0ken"),
        (
            &server.url,
            netrc("machine other login no password no\nmachine 127.0.0.1 login me password p"),
            "Basic bWU6cA==",
        ),
        (&in_url, Credentials::None, "Basic bWU6cDpzcw=="),
        (&in_url, netrc("default login no password no"), "Basic bWU6cDpzcw=="),
    ] {
        *server.lock() = State { wanted: Some(wanted.into()), ranges: true, ..State::default() };
        let options = CacheOptions { credentials, ..options() };
        let cache = open(url, &options).unwrap();
        let put = put(&cache, "x", &noise(100_000));
        server.lock().faults.push_back(Fault::Truncate(50_000));
        assert!(get(&cache, &put).unwrap() == nar_of_file(&noise(100_000)), "{wanted}");
        let shown = std::mem::take(&mut server.lock().shown);
        assert!(shown.iter().all(|shown| shown.as_deref() == Some(wanted)), "{wanted}: {shown:?}");
    }
    // Nothing is shown, or not the right thing: said once, with what to do and without what was shown.
    for (credentials, says) in [
        (Credentials::None, "none are given"),
        (netrc("machine other login no password hush"), "none are given"),
        (Credentials::Bearer(Secret::new("hush")), "does not accept"),
    ] {
        server.requests();
        let error = open(&server.url, &CacheOptions { credentials, ..options() })
            .unwrap()
            .narinfo(&path)
            .unwrap_err();
        assert_eq!((error.category(), error.is_transient()), ("denied", false));
        assert!(error.to_string().contains(says) && !format!("{error:?}").contains("hush"), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
    // From who was shown credentials, "forbidden" does not mean "absent".
    server.lock().wanted = None;
    for (credentials, absent) in [(Credentials::None, true), (basic, false)] {
        server.lock().faults.push_back(Fault::Status(403));
        let cache = open(&server.url, &CacheOptions { credentials, ..options() }).unwrap();
        server.lock().files.insert("nix-cache-info".into(), b"StoreDir: /nix/store\n".to_vec());
        match cache.files().open("nix-cache-info") {
            Ok(None) => assert!(absent),
            Err(error) => assert!(!absent && error.category() == "denied", "{error}"),
            Ok(Some(_)) => panic!("403 is an answer"),
        }
    }
}

#[test]
fn credentials_that_cannot_be_used() {
    let with = |url: &str, credentials| match open(url, &CacheOptions { credentials, ..options() }) {
        Ok(_) => panic!("{url} was opened"),
        Err(error) => error.to_string(),
    };
    let (secret, url) = (|| Secret::new("hu\nsh"), "http://h.example");
    let keys =
        Credentials::Aws { access_key_id: "id".into(), secret_access_key: secret(), session_token: None };
    for (url, credentials, says) in [
        (url, Credentials::Bearer(secret()), "line's end"),
        (url, Credentials::Basic { user: "a:b".into(), password: secret() }, "colon"),
        (url, Credentials::Netrc(secret()), "netrc"),
        (url, keys, "s3://"),
        ("http://me:hush@h.example", Credentials::Bearer(Secret::new("x")), "as well"),
        ("http://%ff:hush@h.example", Credentials::None, "UTF-8"),
    ] {
        let said = with(url, credentials);
        assert!(said.contains(says) && !said.contains("hu") && !said.contains("me:"), "{said}");
    }
}

/// Another port is another origin.
#[test]
fn credentials_go_nowhere_else() {
    let (own, other) = (Server::start(), Server::start());
    let credentials = Credentials::Bearer(Secret::new("t0ken"));
    let cache = open(&own.url, &CacheOptions { credentials, ..options() }).unwrap();
    let path = put(&cache, "x", &noise(100_000));
    let narinfo = cache.narinfo(&path).unwrap().unwrap();
    let nar = own.lock().files[&narinfo.url].clone();
    // Over there by three steps, of which the second would be the one where a client finds its headers again.
    own.lock().redirects.insert(narinfo.url.clone(), (302, format!("http://a:b@{}/one", &other.url[7..])));
    other.lock().redirects.insert("one".into(), (307, "/two".into()));
    other.lock().files.insert("two".into(), nar);
    other.lock().faults.push_back(Fault::Truncate(50_000));
    own.lock().shown.clear();
    assert!(get(&cache, &path).unwrap() == nar_of_file(&noise(100_000)));
    assert!(own.lock().shown.iter().all(Option::is_some));
    let shown = std::mem::take(&mut other.lock().shown);
    assert!(shown.len() >= 4 && shown.iter().all(Option::is_none), "{shown:?}");
    // A narinfo file that names another place.
    let text =
        NarInfo { url: format!("http://a:b@{}/two", &other.url[7..]), ..narinfo }.print(&options().dir);
    own.lock().files.insert(format!("{}.narinfo", path.hash_part()), text.into_bytes());
    assert!(get(&cache, &path).unwrap() == nar_of_file(&noise(100_000)));
    // An upload, which keeps its method. Where it is told to ask elsewhere how it went, that is no success.
    let nar = nar_of_file(b"y");
    let info = info_of("y", &nar);
    let name = format!("{}.narinfo", info.path.hash_part());
    own.lock().redirects.insert(format!("PUT {name}"), (307, format!("{}/three", other.url)));
    cache.put(&info, &spool(&nar)).unwrap();
    assert!(other.lock().files["three"].starts_with(b"StorePath"));
    other.lock().redirects.insert("PUT three".into(), (303, "/two".into()));
    let error = cache.put(&info, &spool(&nar)).unwrap_err();
    assert!(matches!(error, Error::Status { status: 303, .. }), "{error}");
    other.lock().redirects.insert("PUT three".into(), (308, "/three".into()));
    assert!(cache.put(&info, &spool(&nar)).unwrap_err().to_string().contains("more than"));
    assert!(other.lock().shown.iter().all(Option::is_none));
}

#[test]
fn tls_needs_a_known_authority() {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let certificate = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(certificate.path(), made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = io::BufReader::new(rustls::StreamOwned::new(connection, stream));
            let mut line = String::new();
            // It has nothing, but says so to those who trust it.
            while io::BufRead::read_line(&mut stream, &mut line).is_ok_and(|count| count > 2) {
                line.clear();
            }
            let answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let _ = io::Write::write_all(stream.get_mut(), answer);
        }
    });
    let path = store_path("x");
    let knows = CacheOptions { certificates: Some(certificate.path().to_owned()), ..options() };
    assert_eq!(open(&url, &knows).unwrap().narinfo(&path).unwrap(), None);
    // Whether this machine has any authorities of its own or not, this one is none of them.
    let stranger = CacheOptions { attempts: 1, ..options() };
    let error = match open(&url, &stranger) {
        Ok(cache) => cache.narinfo(&path).unwrap_err(),
        Err(error) => error,
    };
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[test]
fn urls() {
    let shown = |url: &str| open(url, &options()).map(|cache| cache.url()).map_err(|error| error.to_string());
    assert_eq!(shown("http://h.example/a?priority=10").unwrap(), "http://h.example/a");
    assert_eq!(shown("http://me:secret@h.example:81/a/").unwrap(), "http://h.example:81/a");
    for bad in ["http://", "http://h.example/?colour=blue", "http://me:secret@h.example/?token=secret"] {
        let error = shown(bad).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
    let inside = open("http://me:secret@h.example/a", &options()).unwrap();
    assert_eq!(inside.files().url(Some("x.narinfo")), "http://h.example/a/x.narinfo");
}
