//! Against a service that says what it is told to. A real one is in the peers tests.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};

use super::*;
use crate::testing::{info_of, nar_of_file, spool, store_path};
use crate::{Cache, Credentials, Secret};

/// Method, target and header lines of a request, and its body.
struct Asked {
    line: String,
    head: String,
    body: Vec<u8>,
}

/// Status, further header lines, body.
type Answer = (u16, &'static str, String);

/// A server on loopback that answers each request as a function says, and keeps all of them.
struct Service {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Service {
    fn start(answer: impl Fn(&Asked) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (asked, answer) = (Arc::<Mutex<Vec<String>>>::default(), Arc::new(answer));
        let log = Arc::clone(&asked);
        // Ends with the process: nothing waits for it.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                thread::spawn(move || while serve(&stream, &log, &*answer).is_some() {});
            }
        });
        Self { endpoint, asked }
    }

    fn open(&self, query: &str) -> BinaryCache<S3> {
        let url = format!("s3://b?endpoint={}{query}", self.endpoint);
        open(&url, &options()).unwrap()
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn options() -> CacheOptions {
    let credentials = Credentials::Aws {
        access_key_id: "id".into(),
        secret_access_key: Secret::new("hush"),
        session_token: Some(Secret::new("lent")),
    };
    CacheOptions { attempts: 3, credentials, ..CacheOptions::default() }
}

/// One request. None when the connection is at its end, or the answer gets lost.
fn serve(
    stream: &TcpStream,
    log: &Mutex<Vec<String>>,
    answer: &dyn Fn(&Asked) -> Option<Answer>,
) -> Option<()> {
    let mut input = BufReader::new(stream);
    let (mut line, mut head) = (String::new(), String::new());
    input.read_line(&mut line).ok().filter(|count| *count > 0)?;
    while !head.ends_with("\r\n\r\n") && !head.starts_with("\r\n") {
        input.read_line(&mut head).ok().filter(|count| *count > 0)?;
    }
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    input.read_exact(&mut body).ok()?;
    let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    log.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
    let head_only = line.starts_with("HEAD");
    let (status, headers, body) = answer(&Asked { line, head, body })?;
    let mut output = stream;
    let length = if headers.contains("content-length") {
        String::new()
    } else {
        format!("content-length: {}\r\n", body.len())
    };
    output.write_all(format!("HTTP/1.1 {status} X\r\n{length}{headers}\r\n").as_bytes()).ok()?;
    if head_only { Some(()) } else { output.write_all(body.as_bytes()).ok() }
}

fn says(status: u16, code: &str) -> Option<Answer> {
    Some((status, "", format!("<Error><Code>{code}</Code><Message>Because.</Message></Error>")))
}

fn fine(headers: &'static str) -> Option<Answer> {
    Some((200, headers, String::new()))
}

/// 12 MiB in parts of 5.
const LARGE: &str = "&multipart-chunk-size=5242880";

fn put_large(cache: &BinaryCache<S3>) -> Result<(), Error> {
    let bytes: Vec<u8> = (0..12u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let body = move |offset: u64| {
        let mut reader = io::Cursor::new(bytes.clone());
        reader.set_position(offset);
        Ok(Box::new(reader) as Box<dyn Read + Send>)
    };
    cache.files().put("nar/large.nar", "application/x-nix-nar", 12 << 20, &body)
}

fn count(asked: &[String], what: &str) -> usize {
    asked.iter().filter(|line| line.contains(what)).count()
}

#[test]
fn requests_are_signed_and_say_what_they_carry() {
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let kept = Arc::clone(&heads);
    let service = Service::start(move |asked| {
        if asked.line.contains(".narinfo") && asked.line.starts_with("PUT") {
            assert!(
                asked.head.contains(&format!("x-amz-content-sha256: {}", Sha256::of(&asked.body).to_hex()))
            );
        }
        kept.lock().unwrap().push(format!("{}\r\n{}", asked.line, asked.head));
        if asked.line.starts_with("PUT") { fine("") } else { says(404, "NoSuchKey") }
    });
    let cache = service.open("&region=eu-west-2&storage-class=GLACIER_IR");
    let nar = nar_of_file(b"hello");
    cache.put(&info_of("x", &nar), &spool(&nar)).unwrap();
    let heads = heads.lock().unwrap();
    for head in &*heads {
        assert!(head.contains("authorization: AWS4-HMAC-SHA256 Credential=id/"), "{head}");
        assert!(head.contains("/eu-west-2/s3/aws4_request,SignedHeaders="), "{head}");
        assert!(head.contains("x-amz-security-token: lent") && !head.contains("hush"), "{head}");
    }
    let puts: Vec<_> = heads.iter().filter(|head| head.starts_with("PUT")).collect();
    assert_eq!(puts.len(), 3);
    assert!(puts[0].contains("nix-cache-info") && puts[1].contains("/nar/") && puts[2].contains(".narinfo"));
    assert!(puts.iter().all(|head| head.contains("x-amz-storage-class: GLACIER_IR")));
    assert!(puts[2].contains("content-type: text/x-nix-narinfo"), "{}", puts[2]);
    // Nobody's requests have no signature.
    let keys = Keyring::Nobody;
    let Bucket { location, transport, .. } = &*cache.files().0;
    let public = Bucket { location: location.clone(), keys, transport: Arc::clone(transport) };
    let call = Call { act: "", method: &Method::GET, url: &location.object("x"), headers: &[] };
    assert!(public.request(call, Sha256::of(b"")).unwrap().build().unwrap().headers().is_empty());
}

#[test]
fn what_is_not_there_and_what_is_wrong() {
    let script = Arc::new(Mutex::new(VecDeque::new()));
    let answers = Arc::clone(&script);
    let service = Service::start(move |asked| match answers.lock().unwrap().pop_front() {
        Some((status, code)) => says(status, code),
        None if asked.line.contains("cache-info") => Some((200, "", "StoreDir: /nix/store\n".into())),
        None => says(404, "NoSuchKey"),
    });
    let cache = service.open("");
    let path = store_path("x");
    assert_eq!(cache.narinfo(&path).unwrap(), None);
    for (status, code, missing) in [
        (404, "NoSuchKey", true),
        (403, "AccessDenied", true),
        (404, "NoSuchBucket", false),
        (403, "SignatureDoesNotMatch", false),
        (403, "RequestTimeTooSkewed", false),
        (301, "PermanentRedirect", false),
    ] {
        script.lock().unwrap().push_back((status, code));
        service.asked();
        match cache.narinfo(&path) {
            Ok(None) => assert!(missing, "{code}"),
            Err(error) => {
                assert!(!missing && error.category() == "s3" && !error.is_transient(), "{error}");
                assert!(error.to_string().contains(code), "{error}");
            }
            Ok(Some(_)) => panic!("{code} is an answer"),
        }
        assert_eq!(service.asked().len(), 1, "{code}");
    }
    // What passes is waited out, whatever its status.
    script.lock().unwrap().extend([(503, "SlowDown"), (400, "RequestTimeout")]);
    assert_eq!(cache.narinfo(&path).unwrap(), None);
    assert_eq!(service.asked().len(), 3);
    script.lock().unwrap().extend([(400, "RequestTimeout"); 3]);
    let error = cache.narinfo(&path).unwrap_err();
    assert!(error.is_transient() && service.asked().len() == 3, "{error}");
}

#[test]
fn nobody_else_gets_to_see_what_signs_a_request() {
    let other = Service::start(|_| fine(""));
    let place: &'static str = format!("location: {}/b/x\r\n", other.endpoint).leak();
    let service = Service::start(move |_| Some((307, place, "<Code>TemporaryRedirect</Code>".into())));
    let error = service.open("").narinfo(&store_path("x")).unwrap_err();
    assert!(error.to_string().contains("check region= and endpoint="), "{error}");
    assert_eq!(other.asked(), Vec::<String>::new());
}

/// Answers an upload in parts; `odd` may answer in its place.
fn parts(odd: impl Fn(&Asked) -> Option<Option<Answer>> + Send + Sync + 'static) -> Service {
    Service::start(move |asked| {
        if let Some(answer) = odd(asked) {
            return answer;
        }
        let line = &asked.line;
        match line.split(' ').next().unwrap() {
            "POST" if line.ends_with("?uploads=") => {
                Some((200, "", "<Result><UploadId>u/1+</UploadId></Result>".into()))
            }
            "PUT" => fine("etag: \"tag\"\r\n"),
            "POST" | "DELETE" => fine(""),
            _ => says(404, "NoSuchKey"),
        }
    })
}

/// The first time only.
fn once(
    what: &'static str,
    answer: impl Fn() -> Option<Answer> + Send + Sync,
) -> impl Fn(&Asked) -> Option<Option<Answer>> + Send + Sync {
    let left = Mutex::new(1);
    move |asked| {
        let mut left = left.lock().unwrap();
        (asked.line.contains(what) && *left > 0).then(|| {
            *left -= 1;
            answer()
        })
    }
}

#[test]
fn a_part_is_sent_again_alone() {
    let service = parts(once("partNumber=2", || says(500, "InternalError")));
    put_large(&service.open(LARGE)).unwrap();
    let asked = service.asked();
    for (what, times) in [("partNumber=1", 1), ("partNumber=2", 2), ("partNumber=3", 1), ("DELETE", 0)] {
        assert_eq!(count(&asked, what), times, "{what}: {asked:?}");
    }
    assert!(
        asked.iter().all(|line| !line.contains("uploadId") || line.contains("uploadId=u%2F1%2B")),
        "{asked:?}"
    );
    assert!(asked.last().unwrap().starts_with("POST"), "{asked:?}");
    // Small ones go in one piece.
    put_large(&service.open("")).unwrap();
    assert_eq!(service.asked(), ["PUT /b/nar/large.nar"]);
}

#[test]
fn an_upload_that_fails_leaves_nothing_behind() {
    for (what, status, code) in
        [("partNumber=3", 403, "AccessDenied"), ("POST /b/nar/large.nar?uploadId", 400, "InvalidPart")]
    {
        let service = parts(move |asked| asked.line.contains(what).then(|| says(status, code)));
        let error = put_large(&service.open(LARGE)).unwrap_err();
        assert!(error.to_string().contains(code), "{error}");
        let asked = service.asked();
        assert!(asked.last().unwrap().starts_with("DELETE /b/nar/large.nar?uploadId="), "{asked:?}");
    }
    // Nothing begun, nothing to delete.
    let service = parts(|asked| asked.line.ends_with("?uploads=").then(|| says(403, "AccessDenied")));
    assert!(put_large(&service.open(LARGE)).is_err());
    assert_eq!(service.asked().len(), 1);
}

#[test]
fn completing_may_fail_with_success_and_succeed_with_failure() {
    const COMPLETE: &str = "POST /b/nar/large.nar?uploadId";
    // A status of 200, sent before anything was done, and an error behind it.
    let service = parts(once(COMPLETE, || says(200, "InternalError")));
    put_large(&service.open(LARGE)).unwrap();
    assert_eq!(count(&service.asked(), COMPLETE), 2);
    let service = parts(|asked| asked.line.starts_with(COMPLETE).then(|| says(200, "InternalError")));
    let error = put_large(&service.open(LARGE)).unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!((count(&service.asked(), "DELETE"), error.category()), (1, "s3"));
    // The answer is lost, and the upload is gone when it is asked again: what counts is whether the object is there.
    for (headers, stored) in [("content-length: 12582912\r\n", true), ("content-length: 5\r\n", false)] {
        let lost = once(COMPLETE, || None);
        let service = parts(move |asked| {
            lost(asked).or_else(|| {
                let again = asked.line.starts_with(COMPLETE).then(|| says(404, "NoSuchUpload"));
                again.or_else(|| asked.line.starts_with("HEAD").then(|| fine(headers)))
            })
        });
        assert_eq!(put_large(&service.open(LARGE)).is_ok(), stored);
    }
}

#[test]
fn urls_for_others() {
    let of = |url: &str, options: &CacheOptions, valid: u64| {
        presign(url, options, Presigned::Put, "nar/x+.nar", Duration::from_secs(valid))
    };
    let url = of("s3://b?region=eu-west-2&scheme=http", &options(), 600).unwrap();
    assert!(
        url.starts_with("http://b.s3.eu-west-2.amazonaws.com/nar/x%2B.nar?X-Amz-Algorithm=AWS4"),
        "{url}"
    );
    assert!(
        url.contains("X-Amz-Expires=600")
            && url.contains("X-Amz-Security-Token=lent")
            && !url.contains("hush")
    );
    assert!(
        of("s3://b?scheme=http", &options(), 0).is_err()
            && of("s3://b?scheme=http", &options(), 8 * 24 * 3600).is_err()
    );
}

#[test]
fn lent_keys_are_renewed_before_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "first/token\n").unwrap();
    let (asked, until) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Some(60))));
    let (log, ends) = (Arc::clone(&asked), Arc::clone(&until));
    let service = Service::start(move |asked| {
        log.lock().unwrap().push(String::from_utf8(asked.body.clone()).unwrap());
        let Some(seconds) = *ends.lock().unwrap() else { return says(403, "AccessDenied") };
        let until = Timestamp::now() + Duration::from_secs(seconds);
        let id = format!("<AccessKeyId>id{}</AccessKeyId>", log.lock().unwrap().len());
        let rest = "<SecretAccessKey>hush</SecretAccessKey><SessionToken>lent</SessionToken>";
        Some((200, "", format!("<R>{id}{rest}<Expiration>{until}</Expiration></R>")))
    });
    let transport = Arc::new(Transport::new(&options(), false, redirect::Policy::none()).unwrap());
    let place = lent::Place::WebIdentity {
        endpoint: service.endpoint,
        role: "arn:r".into(),
        session: "drover".into(),
        token_file: file.display().to_string(),
    };
    let lender = Lender::new(place, Arc::clone(&transport));
    // A minute is less than what they are renewed before; for want of others they are used all the same.
    assert_eq!(lender.keys().unwrap().id, "id1");
    *until.lock().unwrap() = None;
    assert_eq!(lender.keys().unwrap().id, "id1");
    *until.lock().unwrap() = Some(3600);
    std::fs::write(&file, "second").unwrap();
    assert_eq!(lender.keys().unwrap().id, "id3");
    assert_eq!(lender.keys().unwrap().id, "id3");
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 3);
    assert!(
        asked[0].contains("RoleArn=arn%3Ar") && asked[0].ends_with("WebIdentityToken=first%2Ftoken"),
        "{asked:?}"
    );
    assert!(asked[2].ends_with("WebIdentityToken=second"), "{asked:?}");

    let agent = Service::start(|asked| {
        let shown = asked.head.contains("authorization: second");
        let json =
            r#"{"AccessKeyId":"a","SecretAccessKey":"hush","Token":"t","Expiration":"2999-01-01T00:00:00Z"}"#;
        if shown { Some((200, "", json.into())) } else { says(401, "") }
    });
    let of = |token| {
        Lender::new(lent::Place::Container { url: agent.endpoint.clone(), token }, Arc::clone(&transport))
    };
    let token = lent::Token::File(file.display().to_string());
    assert_eq!(of(Some(token)).keys().unwrap().id, "a");
    let error = of(None).keys().unwrap_err().to_string();
    assert!(error.contains("get keys from") && error.contains("401"), "{error}");
}
