//! Binary caches in a directory (Nix: local-binary-cache-store.cc).

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::PathBuf;

use crate::binary::{BinaryCache, Body, Files};
use crate::{CacheOptions, Error};

pub(crate) struct Directory {
    root: PathBuf,
}

pub(crate) fn open(url: &str, options: &CacheOptions) -> Result<BinaryCache<Directory>, Error> {
    let path = crate::http::without_parameters(url)?;
    let root = path.strip_prefix("file://").unwrap_or(path);
    if !root.starts_with('/') {
        let why = "file:// is followed by an absolute path, as in file:///srv/cache".into();
        return Err(Error::Url { url: url.to_owned(), why });
    }
    Ok(BinaryCache::new(Directory { root: PathBuf::from(root) }, options))
}

impl Files for Directory {
    fn url(&self, name: Option<&str>) -> String {
        match name {
            None => format!("file://{}", self.root.display()),
            Some(name) => self.root.join(name).display().to_string(),
        }
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let path = self.root.join(name);
        match File::open(&path) {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // A wrong path would otherwise look like a cache that has nothing.
                if !self.root.is_dir() && self.root.exists() {
                    let source = ErrorKind::NotADirectory.into();
                    return Err(Error::io("use as a cache", &self.root)(source));
                }
                Ok(None)
            }
            Err(error) => Err(Error::io("open", &path)(error)),
        }
    }

    fn open_url(&self, url: &str) -> Result<Option<Box<dyn Read + Send>>, Error> {
        let why = "a cache in a directory keeps its NARs there, and no full URLs".into();
        let source = drover_nix::Error::NarInfo { field: "URL", why };
        Err(Error::Format { url: url.to_owned(), source })
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        let path = self.root.join(name);
        path.try_exists().map_err(Error::io("look for", &path))
    }

    fn put(&self, name: &str, _content_type: &str, _size: u64, body: &Body<'_>) -> Result<(), Error> {
        let path = self.root.join(name);
        let dir = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(dir).map_err(Error::io("make directory", dir))?;
        let store = || -> io::Result<()> {
            // Readable by others, as caches are; it gets its name when it is complete and on the disk.
            let mut file = tempfile::Builder::new()
                .prefix(".tmp-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                .tempfile_in(dir)?;
            io::copy(&mut body(0)?, &mut file)?;
            file.flush()?;
            file.as_file().sync_data()?;
            file.persist(&path)?;
            // The name too: after a power failure, a narinfo file must not be there without the NAR that came before it.
            File::open(dir)?.sync_all()
        };
        store().map_err(Error::io("write", &path))
    }
}
