use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, BufWriter, Read, Write};

use drover_nix::{BasicDerivation, PathInfo, Sha256, StoreDir, StorePath};

use crate::commands::{
    Command, add_to_store_nar, build_derivation, build_paths, dump_store_path, dump_store_path_frames,
    dump_store_path_from, export_paths, import_paths, query_closure, query_path_infos, query_valid_paths,
    read_done,
};
use crate::nar_copy::{copy_bytes, copy_nar, copy_nar_hashed};
use crate::wire::{self, WireWrite as _};
use crate::{BuildOptions, BuildResult, BuildTarget, Error, ReceivedPath, Version, greeting};

const READ_BUFFER: usize = 256 << 10;
const WRITE_BUFFER: usize = 64 << 10;
/// NARs are sent in pieces of at most this many bytes.
const PIECE: usize = 128 << 10;
/// Additions that may await their answer. Answers are 8 bytes each; a socket that nobody reads holds at least a few
/// hundred of them, whatever its bookkeeping costs, so the server never blocks on one while we send.
const MAX_IN_FLIGHT: u32 = 64;

/// The client's half of one session.
///
/// The server's stderr, which carries build logs, is the caller's: it must be read all the time, or the server stalls.
/// After an error the session is over; drop it and start another.
pub struct Client<R: Read, W: Write> {
    input: BufReader<R>,
    output: BufWriter<W>,
    dir: StoreDir,
    version: Version,
    in_flight: u32,
}

/// The answer to [`Client::dump_store_path_frames`]. The session goes on behind its end, and nowhere before that.
pub struct Frames<'a, R: Read> {
    input: &'a mut BufReader<R>,
}

impl<R: Read> Frames<'_, R> {
    /// Puts the next frame into `frame`, in the place of what was there; false if there was none left, which the server
    /// says once.
    pub fn next(&mut self, frame: &mut Vec<u8>) -> Result<bool, Error> {
        dump_store_path_frames::read_frame(self.input, frame)
    }
}

impl<R: Read, W: Write> Client<R, W> {
    /// Greets the server, which has the store directory `dir`.
    pub fn connect(reader: R, mut writer: W, dir: StoreDir) -> Result<Self, Error> {
        writer
            .write_all(&greeting::client_hello())
            .and_then(|()| writer.flush())
            .map_err(Error::io("sending the greeting"))?;
        let mut input = BufReader::with_capacity(READ_BUFFER, reader);
        let version = greeting::read_server_hello(&mut input)?;
        let output = BufWriter::with_capacity(WRITE_BUFFER, writer);
        Ok(Self { input, output, dir, version, in_flight: 0 })
    }

    /// The version in force.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The valid ones among `paths`. `lock` keeps all of them from the collector until the session ends; `substitute`
    /// has the server fetch missing ones first, as far as it can. Both only with a server that may write.
    pub fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, Error> {
        self.finish_nars()?;
        query_valid_paths::write_request(&mut self.output, &self.dir, paths, lock, substitute)?;
        self.flush()?;
        let valid = wire::read_paths(&mut self.input, &self.dir)?;
        match valid.difference(paths).next() {
            Some(stray) => {
                let why = format!("{stray} was not asked for");
                Err(Error::invalid("the answer to QueryValidPaths", why))
            }
            None => Ok(valid),
        }
    }

    /// What the server knows about the valid ones among `paths`. Before version 2.4 it does not say their hashes: then
    /// it has to send the paths themselves, which are hashed here.
    pub fn query_path_infos(
        &mut self,
        paths: &BTreeSet<StorePath>,
    ) -> Result<BTreeMap<StorePath, PathInfo>, Error> {
        self.finish_nars()?;
        query_path_infos::write_request(&mut self.output, &self.dir, paths)?;
        self.flush()?;
        let known = query_path_infos::read_answer(&mut self.input, &self.dir, self.version, paths)?;
        let mut infos = BTreeMap::new();
        for (path, info) in known {
            let (nar_hash, nar_size) = match info.nar_hash {
                Some(hash) => (hash, info.nar_size),
                None => self.hash_path(&path, info.nar_size)?,
            };
            infos.insert(path.clone(), info.into_info(path, nar_hash, nar_size));
        }
        Ok(infos)
    }

    /// Writes the NAR of a valid path to `sink`, checked for its form but not for its hash, and returns its size in
    /// bytes. An invalid path ends the session.
    pub fn dump_store_path(&mut self, path: &StorePath, sink: &mut dyn Write) -> Result<u64, Error> {
        self.finish_nars()?;
        dump_store_path::write_request(&mut self.output, &self.dir, path)?;
        self.flush()?;
        copy_nar(&mut self.input, path, sink)
    }

    /// Writes what the NAR of a valid path has behind its first `offset` bytes to `sink`: up to `size`, which the server
    /// has said. It is checked for nothing: its form and hash are those of the whole. Only Drover's server knows this
    /// command; any other ends the session.
    pub fn dump_store_path_from(
        &mut self,
        path: &StorePath,
        offset: u64,
        size: u64,
        sink: &mut dyn Write,
    ) -> Result<(), Error> {
        self.finish_nars()?;
        let request = dump_store_path_from::Request { path: path.clone(), offset };
        request.write(Command::DumpStorePathFrom, &mut self.output, &self.dir)?;
        self.flush()?;
        copy_bytes(&mut self.input, path, size.saturating_sub(offset), sink)
    }

    /// Whether the server knows [`Self::dump_store_path_frames`]. Asks it, which any server understands.
    pub fn knows_frames(&mut self) -> Result<bool, Error> {
        let announcement = dump_store_path_frames::announcement();
        Ok(!self.query_valid_paths(&[announcement].into(), false, false)?.is_empty())
    }

    /// What the NAR of a valid path has behind its first `offset` bytes, compressed. It is checked for nothing. Only for a
    /// server that [knows it](Self::knows_frames); any other ends the session.
    pub fn dump_store_path_frames(&mut self, path: &StorePath, offset: u64) -> Result<Frames<'_, R>, Error> {
        self.finish_nars()?;
        let request = dump_store_path_from::Request { path: path.clone(), offset };
        request.write(Command::DumpStorePathFrames, &mut self.output, &self.dir)?;
        self.flush()?;
        Ok(Frames { input: &mut self.input })
    }

    /// Adds a path whose references are valid there, and waits until it is. `nar` has to have exactly `nar_size`
    /// bytes. Before version 2.5 neither signatures nor content address travel with it.
    pub fn add_to_store_nar(&mut self, info: &PathInfo, nar: &mut dyn Read) -> Result<(), Error> {
        self.send_nar(info, nar)?;
        self.finish_nars()
    }

    /// As [`Self::add_to_store_nar`], but does not wait: several additions are under way at once. The server works
    /// through them in order, so references may be under way too. [`Self::finish_nars`], or any other command, waits.
    pub fn send_nar(&mut self, info: &PathInfo, nar: &mut dyn Read) -> Result<(), Error> {
        if self.in_flight == MAX_IN_FLIGHT {
            // Half of them, so that one flush serves many.
            self.flush()?;
            while self.in_flight > MAX_IN_FLIGHT / 2 {
                self.read_done()?;
            }
        }
        if self.version >= Version::ADD_TO_STORE_NAR {
            let path = ReceivedPath { info: info.clone(), registration_time: 0, ultimate: false };
            add_to_store_nar::write_request(&mut self.output, &self.dir, &path)?;
            self.copy_exactly(info, nar)?;
        } else {
            import_paths::write_start(&mut self.output)?;
            self.put_import(info, nar)?;
            self.output.put_u64(export_paths::END)?;
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Adds several paths with one request, references first, and waits until all are valid: ImportPaths, which Nix
    /// 2.32.0 and 2.32.1 do not have. The server computes their hashes itself; signatures and content addresses do not
    /// travel. If a path is refused those before it are valid nevertheless.
    pub fn import_paths<'n>(
        &mut self,
        paths: impl IntoIterator<Item = (&'n PathInfo, &'n mut dyn Read)>,
    ) -> Result<(), Error> {
        self.finish_nars()?;
        import_paths::write_start(&mut self.output)?;
        for (info, nar) in paths {
            self.put_import(info, nar)?;
        }
        self.output.put_u64(export_paths::END)?;
        self.flush()?;
        read_done(&mut self.input)
    }

    /// Writes the NARs of valid paths to `sink`, one behind the other, references first: ExportPaths, which Nix has up
    /// to 2.31. Returns what is known of each, in this order; hashes and sizes are those of what was received.
    pub fn export_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        sink: &mut dyn Write,
    ) -> Result<Vec<PathInfo>, Error> {
        const WHAT: &str = "the answer to ExportPaths";
        self.finish_nars()?;
        export_paths::write_request(&mut self.output, &self.dir, paths)?;
        self.flush()?;
        let (mut infos, mut left) = (Vec::new(), paths.clone());
        while import_paths::read_more(&mut self.input)? {
            // The stream names a path behind its NAR; until then it is one of those that are still to come.
            let Some(expected) = left.first() else {
                return Err(Error::invalid(WHAT, "it has more paths than were asked for"));
            };
            let (nar_hash, nar_size) = copy_nar_hashed(&mut self.input, expected, sink)?;
            let import_paths::Trailer { path, references, deriver } =
                import_paths::Trailer::read(&mut self.input, &self.dir)?;
            if !left.remove(&path) {
                return Err(Error::invalid(WHAT, format!("{path} was not asked for, or is there twice")));
            }
            let (signatures, ca) = (Vec::new(), None);
            infos.push(PathInfo { path, nar_hash, nar_size, references, deriver, signatures, ca });
        }
        match left.first() {
            Some(missing) => Err(Error::invalid(WHAT, format!("{missing} is not in it"))),
            None => Ok(infos),
        }
    }

    /// Waits until everything that was sent is valid.
    pub fn finish_nars(&mut self) -> Result<(), Error> {
        if self.in_flight > 0 {
            self.flush()?;
        }
        while self.in_flight > 0 {
            self.read_done()?;
        }
        Ok(())
    }

    /// Builds all outputs. `drv_path` names the derivation; it need not exist. Inputs must be valid. Needs version 2.1;
    /// before 2.6 a success does not list the outputs.
    pub fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, Error> {
        self.require(Command::BuildDerivation, Version::BUILD_DERIVATION)?;
        self.finish_nars()?;
        let (output, dir) = (&mut self.output, &self.dir);
        build_derivation::write_request(output, dir, self.version, drv_path, derivation, options)?;
        self.flush()?;
        BuildResult::read(&mut self.input, &self.dir, self.version)
    }

    /// Builds derivations whose files the server has, or makes paths valid by fetching. A failure of it is
    /// [`Error::BuildPaths`], the only error after which the session goes on.
    pub fn build_paths(&mut self, targets: &[BuildTarget], options: &BuildOptions) -> Result<(), Error> {
        self.finish_nars()?;
        build_paths::write_request(&mut self.output, &self.dir, self.version, targets, options)?;
        self.flush()?;
        build_paths::read_answer(&mut self.input)
    }

    /// The closure of valid paths under references, with the valid outputs of every `.drv` in it if asked for.
    pub fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, Error> {
        self.finish_nars()?;
        query_closure::write_request(&mut self.output, &self.dir, paths, include_outputs)?;
        self.flush()?;
        wire::read_paths(&mut self.input, &self.dir)
    }

    /// Hash and size of a path that is valid there, by having it sent. `claimed` is its size, or 0.
    fn hash_path(&mut self, path: &StorePath, claimed: u64) -> Result<(Sha256, u64), Error> {
        dump_store_path::write_request(&mut self.output, &self.dir, path)?;
        self.flush()?;
        let (hash, size) = copy_nar_hashed(&mut self.input, path, &mut io::sink())?;
        if claimed != 0 && claimed != size {
            return Err(Error::NarSize { path: path.clone(), expected: claimed, got: size });
        }
        Ok((hash, size))
    }

    /// One path of an export stream.
    fn put_import(&mut self, info: &PathInfo, nar: &mut dyn Read) -> Result<(), Error> {
        self.output.put_u64(export_paths::MORE)?;
        self.copy_exactly(info, nar)?;
        export_paths::write_trailer(&mut self.output, &self.dir, info)
    }

    fn copy_exactly(&mut self, info: &PathInfo, nar: &mut dyn Read) -> Result<(), Error> {
        let mut piece = vec![0; PIECE.min(usize::try_from(info.nar_size).unwrap_or(PIECE)).max(1)];
        let mut sent = 0;
        loop {
            let got = match nar.read(&mut piece) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(Error::NarSource { path: info.path.clone(), sent, source }),
            };
            let total = sent + got as u64;
            // Even one byte too many would be taken for the next command.
            if total > info.nar_size || (got == 0 && total < info.nar_size) {
                let (path, expected) = (info.path.clone(), info.nar_size);
                return Err(Error::NarSize { path, expected, got: total });
            }
            if got == 0 {
                return Ok(());
            }
            self.output.write_all(&piece[..got]).map_err(Error::io("sending a NAR"))?;
            sent = total;
        }
    }

    fn read_done(&mut self) -> Result<(), Error> {
        read_done(&mut self.input)?;
        self.in_flight -= 1;
        Ok(())
    }

    fn require(&self, command: Command, needs: Version) -> Result<(), Error> {
        match self.version {
            have if have < needs => Err(Error::TooOld { command: command.name(), needs, have }),
            _ => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.output.flush().map_err(Error::io("sending a request"))
    }
}
