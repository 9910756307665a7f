//! Against a server that fails as it is told. Real servers and real Nix are in the peers tests.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use drover_nix::signature::SecretKey;
use drover_nix::{StorePath, narinfo::Compression};

use super::*;
use crate::testing::{Fault, Server, info_of, nar_of_file, spool, store_path};
use crate::{Cache, Stored, VerifiedNar};

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
    // Not for ever.
    server.lock().faults.extend(vec![Fault::Truncate(0); 20]);
    assert!(get(&cache, &path).is_err());
    server.lock().faults.clear();
    // A file that is another one meanwhile is not glued to the beginning of this one.
    let name = cache.narinfo(&path).unwrap().unwrap().url;
    server.lock().headers.insert(name.clone(), "etag: \"one\"\r\n".into());
    let narinfo = cache.narinfo(&path).unwrap().unwrap();
    server.lock().ranges = false;
    server.lock().faults.push_back(Fault::Truncate(100_000));
    let mut body = cache.nar(&narinfo).unwrap();
    server.lock().headers.insert(name, "etag: \"two\"\r\n".into());
    let error = body.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("changed"), "{error}");
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
    server.lock().files.insert(name.clone(), zstd::encode_all(text.as_bytes(), 0).unwrap());
    server.lock().headers.insert(name, "content-encoding: zstd\r\n".into());
    assert_eq!(get(&cache, &path).unwrap(), nar_of_file(b"hello"));
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
