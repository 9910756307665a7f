//! The layout of binary caches (Nix: binary-cache-store.cc), over whatever can fetch and store named files.
//!
//! `nix-cache-info`, `<hash part>.narinfo`, `nar/<file hash>.nar.zst`, `log/<drv>`. Of `nix-cache-info`, `StoreDir` alone
//! counts; the caches' order is the caller's, whatever `Priority` they give themselves.

use std::io::{self, Read, Seek as _, SeekFrom};
use std::sync::atomic::{AtomicBool, Ordering};

use drover_nix::signature::Signature;
use drover_nix::{NarInfo, PathInfo, StorePath, narinfo};

use crate::compression::{self, Bounded};
use crate::spool::SpooledNar;
use crate::{Cache, CacheOptions, Error, Stored, trust};

/// Most bytes of `nix-cache-info` that are read.
const MAX_CACHE_INFO: u64 = 64 << 10;
/// Most bytes of a build log that are stored.
const MAX_LOG: u64 = 1 << 30;

const CACHE_INFO: &str = "nix-cache-info";
const CACHE_INFO_TYPE: &str = "text/x-nix-cache-info";
const NARINFO_TYPE: &str = "text/x-nix-narinfo";
const NAR_TYPE: &str = "application/x-nix-nar";
const LOG_TYPE: &str = "text/plain; charset=utf-8";

/// A file to store: gives its bytes from this offset on, each time that it is called.
pub(crate) type Body<'a> = dyn Fn(u64) -> io::Result<Box<dyn Read + Send>> + Send + Sync + 'a;

/// Named files. Names are relative, made of components that are neither empty nor `.` or `..`.
pub(crate) trait Files: Send + Sync {
    /// Of the whole collection, or of one file; without secrets.
    fn url(&self, name: Option<&str>) -> String;
    /// The file's bytes, any `Content-Encoding` undone. None if it is not there.
    fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, Error>;
    /// A file elsewhere, which a narinfo file names by its full URL.
    fn open_url(&self, url: &str) -> Result<Option<Box<dyn Read + Send>>, Error>;
    fn exists(&self, name: &str) -> Result<bool, Error>;
    /// Stores a file of `size` bytes so that nobody sees it half written.
    fn put(&self, name: &str, content_type: &str, size: u64, body: &Body<'_>) -> Result<(), Error>;
}

pub(crate) struct BinaryCache<F> {
    files: F,
    options: CacheOptions,
    /// `nix-cache-info` was seen, and is of the right store.
    checked: AtomicBool,
    /// There was none. Each narinfo file shows its store as well, so readers do not ask again.
    silent: AtomicBool,
}

impl<F: Files> BinaryCache<F> {
    pub(crate) fn new(files: F, options: &CacheOptions) -> Self {
        Self {
            files,
            options: options.clone(),
            checked: AtomicBool::new(false),
            silent: AtomicBool::new(false),
        }
    }

    #[cfg(test)]
    pub(crate) fn files(&self) -> &F {
        &self.files
    }

    /// Whether the cache says which store it is of. One that is empty may say nothing yet.
    fn check_store_dir(&self) -> Result<bool, Error> {
        if self.checked.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let Some(text) = self.small(CACHE_INFO, MAX_CACHE_INFO)? else {
            self.silent.store(true, Ordering::Relaxed);
            return Ok(false);
        };
        let text = String::from_utf8_lossy(&text);
        let found = text.lines().find_map(|line| line.strip_prefix("StoreDir:")).map(str::trim);
        match found {
            Some(found) if found == self.options.dir.as_str() => {
                self.checked.store(true, Ordering::Relaxed);
                Ok(true)
            }
            found => Err(Error::StoreDir {
                url: self.url(),
                found: found.unwrap_or("(its nix-cache-info does not say)").to_owned(),
                wanted: self.options.dir.as_str().to_owned(),
            }),
        }
    }

    fn small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, Error> {
        let Some(body) = self.files.open(name)? else { return Ok(None) };
        let url = || self.files.url(Some(name));
        let mut bytes = Vec::new();
        body.take(limit + 1).read_to_end(&mut bytes).map_err(|source| Error::Read { url: url(), source })?;
        if bytes.len() as u64 > limit {
            return Err(Error::TooLarge { url: url(), limit });
        }
        Ok(Some(bytes))
    }

    fn put_bytes(&self, name: &str, content_type: &str, bytes: &[u8]) -> Result<(), Error> {
        self.files.put(name, content_type, bytes.len() as u64, &|offset| {
            let mut bytes = io::Cursor::new(bytes.to_vec());
            bytes.set_position(offset);
            Ok(Box::new(bytes))
        })
    }

    /// The narinfo file, whether it is believed or not.
    fn parsed(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let name = narinfo_name(path);
        let Some(text) = self.small(&name, narinfo::MAX_LEN as u64)? else { return Ok(None) };
        let url = || self.files.url(Some(&name));
        let parsed = NarInfo::parse(&self.options.dir, &text)
            .map_err(|source| Error::Format { url: url(), source })?;
        if parsed.info.path != *path {
            return Err(Error::WrongPath { url: url(), wanted: path.clone(), found: parsed.info.path });
        }
        Ok(Some(parsed))
    }

    fn put_narinfo(&self, narinfo: &NarInfo) -> Result<(), Error> {
        let text = narinfo.print(&self.options.dir);
        self.put_bytes(&narinfo_name(&narinfo.info.path), NARINFO_TYPE, text.as_bytes())
    }

    /// Whether what a narinfo file leads to is there. Of one that lies elsewhere nothing is known: it is believed.
    fn has_nar(&self, narinfo: &NarInfo) -> Result<bool, Error> {
        let url = &narinfo.url;
        if url.contains("://") || !is_plain(url) {
            return Ok(true);
        }
        // "No" may mean that the server does not know the question; fetching is one that it does know.
        Ok(self.files.exists(url)? || self.files.open(url)?.is_some())
    }

    /// Where the path is there already. Signatures that it lacks are added if they are over the same content.
    fn add_signatures(&self, mut there: NarInfo, info: &PathInfo) -> Result<Stored, Error> {
        let same = there.info.nar_hash == info.nar_hash && there.info.references == info.references;
        let known = there.info.signatures.len();
        if same {
            add_missing(&mut there.info.signatures, &info.signatures);
        }
        if there.info.signatures.len() > known {
            self.put_narinfo(&there)?;
        }
        Ok(Stored::Already(Box::new(there)))
    }
}

impl<F: Files> Cache for BinaryCache<F> {
    fn url(&self) -> String {
        self.files.url(None)
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        if !self.silent.load(Ordering::Relaxed) {
            self.check_store_dir()?;
        }
        let Some(narinfo) = self.parsed(path)? else { return Ok(None) };
        match trust::check(&self.options, &narinfo.info) {
            Ok(()) => Ok(Some(narinfo)),
            Err(why) => Err(Error::Untrusted { url: self.url(), path: path.clone(), why }),
        }
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        let (body, url) = if narinfo.url.contains("://") {
            (self.files.open_url(&narinfo.url)?, narinfo.url.clone())
        } else {
            let url = self.files.url(Some(&narinfo.url));
            if !is_plain(&narinfo.url) {
                let why = "it leads out of the cache".into();
                let source = drover_nix::Error::NarInfo { field: "URL", why };
                return Err(Error::Format { url, source });
            }
            (self.files.open(&narinfo.url)?, url)
        };
        let Some(body) = body else { return Err(Error::MissingNar { url }) };
        let nar = match compression::decoder(narinfo.compression, body) {
            None => return Err(Error::Compression { url, compression: narinfo.compression }),
            Some(decoder) => decoder.map_err(|source| Error::Read { url, source })?,
        };
        Ok(Box::new(Bounded::new(nar, narinfo.info.nar_size)))
    }

    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<Stored, Error> {
        if info.nar_hash != nar.nar_hash || info.nar_size != nar.nar_size {
            let why = format!("it was to be stored with the NAR of another object ({})", nar.nar_hash);
            return Err(Error::Content { url: self.url(), path: info.path.clone(), why });
        }
        if !self.check_store_dir()? {
            let text = format!("StoreDir: {}\n", self.options.dir);
            self.put_bytes(CACHE_INFO, CACHE_INFO_TYPE, text.as_bytes())?;
            self.checked.store(true, Ordering::Relaxed);
        }
        let mut info = info.clone();
        let before = self.parsed(&info.path)?;
        if let Some(there) = &before {
            if self.has_nar(there)? {
                return self.add_signatures(there.clone(), &info);
            }
            // Nobody can have what that narinfo file promises: it makes way for one that holds. Nix leaves it.
            if there.info.nar_hash == info.nar_hash && there.info.references == info.references {
                add_missing(&mut info.signatures, &there.info.signatures);
            }
        }
        let url = format!("nar/{}.nar{}", nar.file_hash.to_nix32(), nar.compression.suffix());
        if !self.files.exists(&url)? {
            self.files.put(&url, NAR_TYPE, nar.file_size, &|offset| {
                let file = nar.open_file(offset).map_err(io::Error::other)?;
                Ok(Box::new(file))
            })?;
            // That took its time. Who came first meanwhile has told others what the path is: it stays that.
            if let Some(there) = self.parsed(&info.path)?
                && before.as_ref() != Some(&there)
                && self.has_nar(&there)?
            {
                return self.add_signatures(there, &info);
            }
        }
        self.put_narinfo(&NarInfo {
            info,
            url,
            compression: nar.compression,
            file_hash: Some(nar.file_hash),
            file_size: Some(nar.file_size),
        })?;
        Ok(Stored::New)
    }

    fn put_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), Error> {
        let name = log_name(drv);
        let fail = |source| Error::Io { act: format!("keep the log of {drv} for a moment"), source };
        // Its length must be known before it is sent, and it may have to be sent again.
        let mut spool = tempfile::NamedTempFile::new().map_err(fail)?;
        let size = io::copy(&mut log.take(MAX_LOG), &mut spool).map_err(fail)?;
        self.files.put(&name, LOG_TYPE, size, &|offset| {
            let mut file = spool.reopen()?;
            file.seek(SeekFrom::Start(offset))?;
            Ok(Box::new(file))
        })
    }

    fn log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>, Error> {
        self.files.open(&log_name(drv))
    }
}

fn add_missing(signatures: &mut Vec<Signature>, others: &[Signature]) {
    for signature in others {
        if !signatures.contains(signature) {
            signatures.push(signature.clone());
        }
    }
}

fn narinfo_name(path: &StorePath) -> String {
    format!("{}.narinfo", path.hash_part())
}

fn log_name(drv: &StorePath) -> String {
    format!("log/{drv}")
}

/// Whether a name stays within the cache.
fn is_plain(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    !name.is_empty() && name.split('/').all(plain) && !name.contains(['\0', '\\'])
}

#[cfg(test)]
mod tests;
