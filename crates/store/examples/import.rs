//! Times imports into a new store and exports from it: `import DIR KIND [COMMAND ARG...]`, where KIND is `big`,
//! `files` or `paths`.
//!
//! Without a command the store is used directly; with one, by the serve protocol through its standard input and output,
//! `{}` in its arguments being the store's root: `nix-store --serve --write --store {}`. The archives are made in memory
//! first, so that only the transfer counts.

use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use drover_nix::nar::Writer;
use drover_nix::{PathInfo, Sha256, StoreDir};
use drover_serve::Client;
use drover_store::{Access, LocalStore, StoreLayout};

/// Paths that become valid together where the store is used directly.
const BATCH: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(kind)) = (args.next(), args.next()) else {
        return Err("usage: import DIR big|files|paths".into());
    };
    let archives: Vec<Vec<u8>> = match kind.as_str() {
        "big" => (0..4).map(|i| nar(1, 256 << 20, i)).collect::<Result<_, _>>()?,
        "files" => vec![nar(40_000, 2_000, 0)?],
        "paths" => (0..3_000).map(|i| nar(3, 1_000, i)).collect::<Result<_, _>>()?,
        _ => return Err("the kinds are big, files and paths".into()),
    };
    let infos: Vec<PathInfo> =
        archives.iter().enumerate().map(|(i, nar)| info(i, nar)).collect::<Result<_, _>>()?;
    let root = Path::new(&dir).join(format!("drover-import-{}", std::process::id()));
    let command: Vec<String> = args.map(|arg| arg.replace("{}", &root.to_string_lossy())).collect();
    let (import, export) = match &command[..] {
        [] => direct(&root, &infos, &archives)?,
        command => served(command, &infos, &archives)?,
    };
    let bytes: usize = archives.iter().map(Vec::len).sum();
    let rate = |seconds: f64| bytes as f64 / seconds / 1e6;
    println!(
        "{kind}: {bytes} bytes, import {import:.3} s ({:.0} MB/s), export {export:.3} s ({:.0} MB/s)",
        rate(import),
        rate(export)
    );
    drover_store::fs::delete(&root)?;
    Ok(())
}

fn direct(root: &Path, infos: &[PathInfo], archives: &[Vec<u8>]) -> Result<(f64, f64), Box<dyn Error>> {
    let store = LocalStore::open(StoreLayout::in_root(root), Access::ReadWrite)?;
    let start = Instant::now();
    let mut batch = store.batch()?;
    for (info, nar) in infos.iter().zip(archives) {
        batch.add_nar(info, false, 0, &mut &nar[..])?;
        if batch.len() == BATCH {
            batch.commit()?;
        }
    }
    batch.commit()?;
    let import = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for info in infos {
        store.dump(&info.path, &mut std::io::sink())?;
    }
    Ok((import, start.elapsed().as_secs_f64()))
}

fn served(
    command: &[String],
    infos: &[PathInfo],
    archives: &[Vec<u8>],
) -> Result<(f64, f64), Box<dyn Error>> {
    let mut child =
        Command::new(&command[0]).args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err("no pipes".into());
    };
    let mut client = Client::connect(output, input, StoreDir::default())?;
    let start = Instant::now();
    for (info, nar) in infos.iter().zip(archives) {
        client.send_nar(info, &mut &nar[..])?;
    }
    client.finish_nars()?;
    let import = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for info in infos {
        client.dump_store_path(&info.path, &mut std::io::sink())?;
    }
    let export = start.elapsed().as_secs_f64();
    drop(client);
    child.wait()?;
    Ok((import, export))
}

fn info(i: usize, nar: &[u8]) -> Result<PathInfo, drover_nix::Error> {
    let nar_hash = Sha256::of(nar);
    Ok(PathInfo {
        path: StoreDir::default().make_path("bench", nar_hash, &format!("p{i}"))?,
        nar_hash,
        nar_size: nar.len() as u64,
        references: [].into(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    })
}

/// A directory of `files` files of `size` bytes.
fn nar(files: usize, size: usize, seed: usize) -> Result<Vec<u8>, drover_nix::Error> {
    let mut nar = Vec::new();
    let mut writer = Writer::new(&mut nar);
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    writer.directory()?;
    for directory in 0..files.div_ceil(200) {
        writer.entry(format!("d{directory:06}").as_bytes())?;
        writer.directory()?;
        for file in 0..200.min(files - directory * 200) {
            let contents: Vec<u8> = (0..size.div_ceil(8))
                .flat_map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    state.to_le_bytes()
                })
                .collect();
            writer.entry(format!("f{file:06}").as_bytes())?;
            writer.file_bytes(false, &contents[..size])?;
        }
        writer.end_directory()?;
    }
    writer.end_directory()?;
    writer.finish()?;
    Ok(nar)
}
