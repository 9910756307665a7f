//! A local store as a cache: what is valid in it can be had.

use std::io::{self, PipeReader, Read, Write};
use std::thread::{self, JoinHandle};

use drover_nix::narinfo::Compression;
use drover_nix::{NarInfo, PathInfo, StorePath};
use drover_store::{Access, LocalStore, StoreUri};

use crate::{Cache, CacheOptions, Error, SpooledNar, Stored};

pub(crate) struct Local {
    url: String,
    store: LocalStore,
}

pub(crate) fn open(url: &str, options: &CacheOptions) -> Result<Local, Error> {
    let fail = |source| Error::Store { url: url.to_owned(), source };
    let layout = StoreUri::parse(url).and_then(StoreUri::with_environment).map_err(fail)?.layout();
    if layout.store_dir != options.dir {
        return Err(Error::StoreDir {
            url: url.to_owned(),
            found: layout.store_dir.to_string(),
            wanted: options.dir.to_string(),
        });
    }
    if std::path::Path::new(url).join("nix-cache-info").exists() {
        let why = format!("it is a binary cache, not a store; did you mean file://{url} ?");
        return Err(Error::Url { url: url.to_owned(), why });
    }
    Ok(Local { url: url.to_owned(), store: LocalStore::open(layout, Access::ReadOnly).map_err(fail)? })
}

impl Local {
    fn read_only<T>(&self, act: &'static str) -> Result<T, Error> {
        Err(Error::ReadOnly { act, url: self.url.clone() })
    }
}

impl Cache for Local {
    fn url(&self) -> String {
        self.url.clone()
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let info = self.store.path_info(path).map_err(|source| Error::Store { url: self.url(), source })?;
        Ok(info.map(|info| NarInfo {
            url: info.path.to_string(),
            info,
            compression: Compression::None,
            file_hash: None,
            file_size: None,
        }))
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        let pipe = io::pipe().map_err(|source| Error::Io { act: "make a pipe".into(), source })?;
        let (output, input) = pipe;
        let (store, path) = (self.store.clone(), narinfo.info.path.clone());
        let dump = move || {
            let mut input = io::BufWriter::with_capacity(64 << 10, input);
            store.dump(&path, &mut input).map_err(io::Error::other)?;
            input.flush()
        };
        let thread = thread::Builder::new()
            .name("dump".into())
            .spawn(dump)
            .map_err(|source| Error::Io { act: "start a thread".into(), source })?;
        Ok(Box::new(Dump { output, thread: Some(thread) }))
    }

    fn put(&self, _info: &PathInfo, _nar: &SpooledNar) -> Result<Stored, Error> {
        self.read_only("store a path in")
    }

    fn put_log(&self, _drv: &StorePath, _log: &mut dyn Read) -> Result<(), Error> {
        self.read_only("store a log in")
    }
}

/// The reading end. A reader that stops early closes the pipe, which ends the thread.
struct Dump {
    output: PipeReader,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Read for Dump {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.output.read(buffer)?;
        if count == 0
            && !buffer.is_empty()
            && let Some(thread) = self.thread.take()
        {
            // At the end: was it the archive's, or did dumping fail?
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that dumps panicked")))?;
        }
        Ok(count)
    }
}
