//! Large objects, in parts: several on their way at a time, each sent again by itself if it breaks off. All or nothing:
//! parts of an upload that fails are deleted, or they would be paid for without being seen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use reqwest::header::ETAG;
use reqwest::{Method, StatusCode, Url};

use super::location::Location;
use super::refusal::{self, Refusal};
use super::{Bucket, Call, Payload};
use crate::Error;
use crate::binary::Body;
use crate::http::transport::pause;

/// Parts on their way at a time: one connection alone rarely fills the line to a store of this kind.
const PARALLEL: u64 = 4;

/// Stores an object of `size` bytes in parts of `part` bytes.
pub(super) fn upload(
    bucket: &Bucket,
    url: &Url,
    headers: &[(&'static str, String)],
    size: u64,
    part: u64,
    body: &Body<'_>,
) -> Result<(), Error> {
    let create = Location::query(url, &[("uploads", "")]);
    let call = Call { act: "begin to store", method: &Method::POST, url: &create, headers };
    let answer = refusal::text(bucket.expect(call, None)?);
    let id = refusal::element(&answer, "UploadId").filter(|id| !id.is_empty()).ok_or_else(|| {
        Refusal::read(StatusCode::OK.as_u16(), &answer).into_error("begin to store", url.as_str())
    })?;
    let upload = Upload { bucket, url, id, size, part, body };
    upload.parts().and_then(|tags| upload.complete(&tags)).inspect_err(|_| upload.abort())
}

struct Upload<'a> {
    bucket: &'a Bucket,
    url: &'a Url,
    id: String,
    size: u64,
    part: u64,
    body: &'a Body<'a>,
}

impl Upload<'_> {
    /// Sends all parts and returns their tags, in order.
    fn parts(&self) -> Result<Vec<String>, Error> {
        let count = self.size.div_ceil(self.part);
        let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
        let done = Mutex::new(Vec::new());
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count || failed.load(Ordering::Relaxed) {
                    return;
                }
                let sent = self.one(index);
                failed.fetch_or(sent.is_err(), Ordering::Relaxed);
                done.lock().unwrap_or_else(PoisonError::into_inner).push((index, sent));
            }
        };
        drover_store::in_parallel(usize::try_from(PARALLEL.min(count)).unwrap_or(1), work);
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, sent)| sent).collect()
    }

    fn one(&self, index: u64) -> Result<String, Error> {
        let number = (index + 1).to_string();
        let url = Location::query(self.url, &[("partNumber", &number), ("uploadId", &self.id)]);
        let offset = index * self.part;
        let payload = Payload::new(self.url, self.body, offset, self.part.min(self.size - offset))?;
        let call = Call { act: "store a part of", method: &Method::PUT, url: &url, headers: &[] };
        let response = self.bucket.put(call, &payload)?;
        let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        tag.ok_or_else(|| self.odd("store a part of", "its answer has no ETag"))
    }

    /// Makes the object of its parts. S3 may fail at that after it began to answer with 200.
    fn complete(&self, tags: &[String]) -> Result<(), Error> {
        const ACT: &str = "complete";
        let url = Location::query(self.url, &[("uploadId", &self.id)]);
        let parts: String = (1..)
            .zip(tags)
            .map(|(number, tag)| {
                let tag = tag.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;");
                format!("<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>")
            })
            .collect();
        let xml = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>");
        let body = |offset: u64| {
            let mut reader = std::io::Cursor::new(xml.clone().into_bytes());
            reader.set_position(offset);
            Ok(Box::new(reader) as Box<dyn std::io::Read + Send>)
        };
        let payload = Payload::new(self.url, &body, 0, xml.len() as u64)?;
        let headers = [("content-type", "application/xml".to_owned())];
        let call = Call { act: ACT, method: &Method::POST, url: &url, headers: &headers };
        let mut attempt = 1;
        loop {
            let refusal = match self.bucket.answer(call, Some(&payload))? {
                Ok(response) => {
                    let status = response.status().as_u16();
                    let text = refusal::text(response);
                    if !text.contains("<Error>") {
                        return Ok(());
                    }
                    Refusal::read(status, &text)
                }
                Err(refusal) => refusal,
            };
            // It was completed, and the answer was lost on its way.
            if refusal.code == "NoSuchUpload" && self.bucket.size(self.url)? == Some(self.size) {
                return Ok(());
            }
            let passes = refusal.status == StatusCode::OK.as_u16() && refusal.may_pass();
            if !passes || attempt >= self.bucket.transport.attempts() {
                return Err(refusal.into_error(ACT, self.url.as_str()));
            }
            thread::sleep(pause(attempt));
            attempt += 1;
        }
    }

    /// As far as it goes: what failed before is what counts.
    fn abort(&self) {
        let url = Location::query(self.url, &[("uploadId", &self.id)]);
        let call = Call { act: "abort", method: &Method::DELETE, url: &url, headers: &[] };
        let _ = self.bucket.answer(call, None);
    }

    fn odd(&self, act: &'static str, why: &str) -> Error {
        let url = crate::http::transport::redacted(self.url.as_str());
        let why = why.to_owned();
        Error::S3 { act, url, status: 200, code: "no sense".into(), why, transient: false }
    }
}
