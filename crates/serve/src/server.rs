use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, Write};
use std::os::fd::BorrowedFd;

use drover_nix::hash::Sha256Hasher;
use drover_nix::order::references_first;
use drover_nix::{BasicDerivation, PathInfo, StoreDir, StorePath, nar};

use crate::commands::import_paths::{Trailer, read_more};
use crate::commands::{
    Command, DONE, build_derivation, build_paths, dump_store_path_frames, dump_store_path_from, export_paths,
    query_closure, query_path_infos, query_valid_paths,
};
use crate::greeting;
use crate::nar_copy::{Behind, copy_nar};
use crate::wire::{self, WireWrite as _};
use crate::{BoxError, BuildOptions, BuildResult, BuildStatus, BuildTarget, Error, ReceivedPath, Version};

const READ_BUFFER: usize = 256 << 10;
const WRITE_BUFFER: usize = 64 << 10;
/// Additions whose answers may wait for each other. Their answers always fit the buffer for writing, so none leaves
/// before [`Backend::settle`].
const MAX_UNSETTLED: usize = 1024;

/// The store behind a session. An error ends the session, so that a build's failure is not one: it is a result.
pub trait Backend {
    /// The valid ones among `paths`. `lock`: first keep all of them, valid or not, from the collector until the
    /// session ends. `substitute`: then fetch missing ones as far as possible; failing to is not an error. Neither
    /// is set in a read-only session.
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError>;

    /// None for a path that is not valid.
    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError>;

    /// Writes the NAR of a valid path. An error before the first byte for one that is not.
    fn dump(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError>;

    /// [`Self::dump`] for a `nar` that is more than a buffer before where the session's answers go: all has to pass it.
    fn dump_through(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        self.dump(path, nar)
    }

    /// Whether [`Self::dump_frames`] works.
    fn makes_frames(&self) -> bool {
        false
    }

    /// Gives what the NAR of a valid path has behind its first `offset` bytes as compressed frames, at most 2 MiB each.
    /// An error before the first for a path that is not valid, and for one that has fewer bytes.
    fn dump_frames(
        &mut self,
        _path: &StorePath,
        _offset: u64,
        _frames: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), BoxError> {
        Err("this store does not compress".into())
    }

    /// Makes a path valid and keeps it from the collector until the session ends. `nar` ends after exactly
    /// `nar_size` bytes. A backend that finds the path valid leaves `nar` alone; any other reads all of it, checks
    /// hash and size, and fails without a trace if something is wrong.
    fn add_nar(&mut self, path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError>;

    /// [`Self::add_nar`] where large files may be moved from [`Self::input`] by the system.
    fn add_stream(&mut self, path: ReceivedPath, nar: &mut dyn nar::Stream) -> Result<(), BoxError> {
        self.add_nar(path, nar)
    }

    /// The descriptor that the session's reader reads, if it is one and reads nothing ahead.
    fn input(&self) -> Option<BorrowedFd<'static>> {
        None
    }

    /// Builds all outputs. The log goes to the session's stderr, which is not this crate's business.
    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError>;

    /// The closure of `paths`; an error if one of them is not valid.
    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError>;

    /// Makes the targets valid; a status and a message if that fails.
    fn build_paths(
        &mut self,
        _targets: &[BuildTarget],
        _options: &BuildOptions,
    ) -> Result<Result<(), (BuildStatus, String)>, BoxError> {
        let message = "this store builds derivations that it is sent, not derivations that it has";
        Ok(Err((BuildStatus::MiscFailure, message.to_owned())))
    }

    /// An empty, unnamed file to keep a NAR in until its metadata arrives (ImportPaths).
    fn spool(&mut self) -> Result<File, BoxError> {
        Err("this store does not take imports".into())
    }

    /// Called before answers leave, when no further request is waiting: the place to make durable what several
    /// [`Self::add_nar`] calls have in common.
    fn settle(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    /// How many additions since the last [`Self::settle`] that worked are in effect, the first ones: asked for when
    /// something failed, since those are still to be answered. All of them, where an addition takes effect at once.
    fn in_effect(&self) -> usize {
        usize::MAX
    }
}

/// The server's half of one session: answers requests until the client closes its side. `write` allows commands that
/// change the store. On an error the caller says on stderr what it is, closes the connection and exits with a code
/// other than 0: the protocol has no other way to report it.
pub fn serve<R: Read, W: Write>(
    reader: R,
    writer: W,
    backend: &mut dyn Backend,
    dir: &StoreDir,
    write: bool,
) -> Result<(), Error> {
    let mut input = BufReader::with_capacity(READ_BUFFER, reader);
    let mut output = BufWriter::with_capacity(WRITE_BUFFER, writer);
    let version = greeting::answer(&mut input, &mut output)?;
    // At once: the client has to know whom it talks to, even if its first request ends the session.
    output.flush().map_err(Error::io("sending the greeting"))?;
    let mut session = Session { input, output, backend, dir, version, write, unsettled: 0 };
    let result = session.run();
    // What was answered before an error is still true, and the client may be waiting for it.
    let flushed = session.settle();
    // A writer that failed must not be written to again on drop.
    let (_writer, _rest) = session.output.into_parts();
    result.and(flushed)
}

struct Session<'a, R: Read, W: Write> {
    input: BufReader<R>,
    output: BufWriter<W>,
    backend: &'a mut dyn Backend,
    dir: &'a StoreDir,
    version: Version,
    write: bool,
    /// Additions that are not answered yet, since what they have in common is still to be made durable.
    unsettled: usize,
}

impl<R: Read, W: Write> Session<'_, R, W> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            // Requests that are here already may share a flush, and additions what makes them valid. Nothing that was
            // answered waits for what the client has yet to send.
            if self.unsettled == MAX_UNSETTLED || self.input.buffer().is_empty() {
                self.settle()?;
            }
            let Some(command) = Command::read(&mut self.input)? else {
                return Ok(());
            };
            if command.writes() && !self.write {
                return Err(Error::NotWritable { command: command.name() });
            }
            if match command {
                Command::AddToStoreNar => false,
                Command::DumpStorePath
                | Command::DumpStorePathFrames
                | Command::DumpStorePathFrom
                | Command::QueryPathInfos
                | Command::QueryValidPaths => self.unsettled > 0,
                // What may take long lets nobody wait for earlier answers.
                _ => true,
            } {
                self.settle()?;
            }
            self.execute(command)?;
        }
    }

    fn execute(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::AddToStoreNar => self.add_to_store_nar(),
            Command::BuildDerivation => self.build_derivation(),
            Command::BuildPaths => self.build_paths(),
            Command::DumpStorePath => self.dump_store_path(),
            Command::DumpStorePathFrames => self.dump_store_path_frames(),
            Command::DumpStorePathFrom => self.dump_store_path_from(),
            Command::ExportPaths => self.export_paths(),
            Command::ImportPaths => self.import_paths(),
            Command::QueryClosure => self.query_closure(),
            Command::QueryPathInfos => self.query_path_infos(),
            Command::QueryValidPaths => self.query_valid_paths(),
        }
    }

    fn query_valid_paths(&mut self) -> Result<(), Error> {
        let mut request = query_valid_paths::Request::read(&mut self.input, self.dir)?;
        let (lock, substitute) = (request.lock && self.write, request.substitute && self.write);
        let announced = request.paths.take(&dump_store_path_frames::announcement());
        let mut valid = self
            .backend
            .query_valid_paths(&request.paths, lock, substitute)
            .map_err(backend("query valid paths"))?;
        valid.extend(announced.filter(|_| self.backend.makes_frames()));
        self.output.put_paths(self.dir, &valid)
    }

    fn query_path_infos(&mut self) -> Result<(), Error> {
        for path in wire::read_paths(&mut self.input, self.dir)? {
            let info = self.backend.path_info(&path).map_err(backend_on("query the path", &path))?;
            if let Some(info) = info {
                query_path_infos::write_item(&mut self.output, self.dir, self.version, &info)?;
            }
        }
        query_path_infos::write_end(&mut self.output)
    }

    fn dump_store_path(&mut self) -> Result<(), Error> {
        let path = wire::read_path(&mut self.input, self.dir)?;
        self.dump(&path)
    }

    fn dump_store_path_from(&mut self) -> Result<(), Error> {
        let dump_store_path_from::Request { path, offset } =
            dump_store_path_from::Request::read(&mut self.input, self.dir)?;
        let mut rest = Behind { inner: &mut self.output, left: offset };
        self.backend.dump_through(&path, &mut rest).map_err(backend_on("dump", &path))?;
        match rest.left {
            0 => Ok(()),
            left => Err(Error::NarSize { path, expected: offset, got: offset - left }),
        }
    }

    fn dump_store_path_frames(&mut self) -> Result<(), Error> {
        let dump_store_path_from::Request { path, offset } =
            dump_store_path_from::Request::read(&mut self.input, self.dir)?;
        let output = &mut self.output;
        let mut send = |frame: &[u8]| dump_store_path_frames::write_frame(output, frame);
        self.backend.dump_frames(&path, offset, &mut send).map_err(backend_on("dump", &path))?;
        self.output.put_u64(dump_store_path_frames::END)
    }

    fn add_to_store_nar(&mut self) -> Result<(), Error> {
        let received = ReceivedPath::read(&mut self.input, self.dir)?;
        let (path, nar_size) = (received.info.path.clone(), received.info.nar_size);
        if nar_size == 0 {
            return Err(Error::NarSize { path, expected: 0, got: 0 });
        }
        if self.unsettled > 0 && (self.input.buffer().len() as u64) < nar_size {
            self.settle()?;
        }
        let end = self.backend.input();
        let mut nar = Body { input: &mut self.input, end, left: nar_size };
        self.backend.add_stream(received, &mut nar).map_err(backend_on("add", &path))?;
        match nar.left {
            0 => {}
            left if left == nar_size => skip_nar(&mut nar, &path, nar_size)?,
            left => {
                let got = nar_size - left;
                return Err(Error::NarSize { path, expected: nar_size, got });
            }
        }
        self.unsettled += 1;
        Ok(())
    }

    fn build_derivation(&mut self) -> Result<(), Error> {
        let request = build_derivation::Request::read(&mut self.input, self.dir, self.version)?;
        let result = self
            .backend
            .build_derivation(&request.drv_path, &request.derivation, &request.options)
            .map_err(backend_on("build", &request.drv_path))?;
        result.write(&mut self.output, self.dir, self.version)
    }

    fn build_paths(&mut self) -> Result<(), Error> {
        let request = build_paths::Request::read(&mut self.input, self.dir, self.version)?;
        let answer =
            self.backend.build_paths(&request.targets, &request.options).map_err(backend("build paths"))?;
        build_paths::write_answer(&mut self.output, &answer)
    }

    fn query_closure(&mut self) -> Result<(), Error> {
        let request = query_closure::Request::read(&mut self.input, self.dir)?;
        let closure = self
            .backend
            .query_closure(&request.paths, request.include_outputs)
            .map_err(backend("query a closure"))?;
        self.output.put_paths(self.dir, &closure)
    }

    fn export_paths(&mut self) -> Result<(), Error> {
        let mut infos = BTreeMap::new();
        for path in export_paths::read_request(&mut self.input, self.dir)? {
            let info = self.backend.path_info(&path).map_err(backend_on("query the path", &path))?;
            let info = info.ok_or_else(|| Error::Backend {
                act: format!("export {path}"),
                source: "the path is not valid".into(),
            })?;
            infos.insert(path, info);
        }
        let below = |path: &StorePath| {
            infos[path]
                .references
                .iter()
                .filter_map(|reference| infos.get_key_value(reference).map(|(there, _)| there))
        };
        let order = references_first(infos.keys(), below).map_err(|(from, to)| Error::Backend {
            act: format!("export {from}"),
            source: format!("it and {to} refer to each other").into(),
        })?;
        for path in order {
            self.output.put_u64(export_paths::MORE)?;
            self.dump(path)?;
            export_paths::write_trailer(&mut self.output, self.dir, &infos[path])?;
        }
        self.output.put_u64(export_paths::END)
    }

    fn import_paths(&mut self) -> Result<(), Error> {
        while read_more(&mut self.input)? {
            let spool = self.backend.spool().map_err(backend("make a file for an import"))?;
            let mut spool =
                Hashed { file: BufWriter::with_capacity(WRITE_BUFFER, spool), hasher: Sha256Hasher::new() };
            let nar_size = copy_nar(&mut self.input, &unnamed(), &mut spool)?;
            let trailer = Trailer::read(&mut self.input, self.dir)?;
            let io_error = |source: io::Error| backend_on("spool", &trailer.path)(source.into());
            let mut file = spool.file.into_inner().map_err(|error| io_error(error.into_error()))?;
            file.rewind().map_err(io_error)?;
            let info = PathInfo {
                path: trailer.path.clone(),
                nar_hash: spool.hasher.finish(),
                nar_size,
                references: trailer.references,
                deriver: trailer.deriver,
                signatures: Vec::new(),
                ca: None,
            };
            let received = ReceivedPath { info, registration_time: 0, ultimate: false };
            self.backend.add_nar(received, &mut file).map_err(backend_on("import", &trailer.path))?;
        }
        self.complete()?;
        self.output.put_u64(DONE)
    }

    fn dump(&mut self, path: &StorePath) -> Result<(), Error> {
        self.backend.dump(path, &mut self.output).map_err(backend_on("dump", path))
    }

    /// Completes additions and sends all answers. Of additions that fail, those before the first mistake are answered.
    fn settle(&mut self) -> Result<(), Error> {
        let completed = self.complete();
        let sent = self.output.flush().map_err(Error::io("sending an answer"));
        completed.and(sent)
    }

    fn complete(&mut self) -> Result<(), Error> {
        let added = std::mem::take(&mut self.unsettled);
        let result = self.backend.settle().map_err(backend("complete additions"));
        let answered = if result.is_ok() { added } else { added.min(self.backend.in_effect()) };
        for _ in 0..answered {
            self.output.put_u64(DONE)?;
        }
        result
    }
}

/// Reads a NAR that nobody needs. It must be as long as was announced: skipping blindly, as Nix does, would take the
/// rest of a longer one for the next request.
fn skip_nar(nar: &mut impl Read, path: &StorePath, nar_size: u64) -> Result<(), Error> {
    match nar::Reader::new(nar).skip_all() {
        Ok(got) if got == nar_size => Ok(()),
        Ok(got) => Err(Error::NarSize { path: path.clone(), expected: nar_size, got }),
        Err(drover_nix::Error::NarIo { source, .. }) => Err(Error::io("skipping a NAR")(source)),
        Err(error) => Err(Error::nix("a NAR")(error)),
    }
}

/// In an export stream a NAR comes before its name.
fn unnamed() -> StorePath {
    StorePath::from_parts([0; 20], "unnamed-import").unwrap_or_else(|_| unreachable!("the name is valid"))
}

/// The archive of one addition in the stream of requests.
struct Body<'a, R> {
    input: &'a mut BufReader<R>,
    /// What `input` reads from.
    end: Option<BorrowedFd<'static>>,
    left: u64,
}

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..most])?;
        self.left -= count as u64;
        Ok(count)
    }
}

impl<R: Read> nar::Stream for Body<'_, R> {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.end.filter(|_| self.input.buffer().is_empty())
    }

    fn taken(&mut self, count: u64) {
        self.left = self.left.saturating_sub(count);
    }
}

struct Hashed {
    file: BufWriter<File>,
    hasher: Sha256Hasher,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn backend(act: &'static str) -> impl FnOnce(BoxError) -> Error {
    move |source| Error::Backend { act: act.to_owned(), source }
}

fn backend_on(act: &'static str, path: &StorePath) -> impl FnOnce(BoxError) -> Error {
    move |source| Error::Backend { act: format!("{act} {path}"), source }
}
