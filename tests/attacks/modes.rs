//! Files that do more than their contents: set-user-ID, capabilities, attributes, and directories open to everybody.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use crate::sys::{AT_FDCWD, call, call32, low, map, text};
use crate::{attempt, out, ready, sys};

/// An access control list that lets everybody write: version 2; user, group, other.
const ACL: [u8; 28] =
    [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 7, 0, 255, 255, 255, 255, 32, 0, 7, 0, 255, 255, 255, 255];
/// A capability to change ids: version 2, effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub fn modes() -> io::Result<()> {
    // SAFETY: only of this process.
    unsafe { sys::umask(0) };
    let out = out();
    std::fs::create_dir(&out)?;
    for dir in [Path::new("/build"), Path::new("/tmp"), &out] {
        let place = dir.file_name().map_or("", |name| name.to_str().unwrap_or("out"));
        let place = if place.len() > 5 { "out" } else { place };
        change_modes(dir, place)?;
        born_privileged(dir, place)?;
        attributes(dir, place)?;
    }
    for dir in ["/build", "/tmp", "/nix/store", "/", "/nix", "/dev", "/etc"] {
        attempt(&format!("open {dir}"), std::fs::set_permissions(dir, Permissions::from_mode(0o777)));
    }
    std::fs::set_permissions(&out, Permissions::from_mode(0o755))?;
    ready();
    Ok(())
}

/// By every call that changes a mode.
fn change_modes(dir: &Path, place: &str) -> io::Result<()> {
    let file = dir.join("changed");
    std::fs::write(&file, "#!/bin/sh\nid\n")?;
    std::fs::set_permissions(&file, Permissions::from_mode(0o755))?;
    let open = File::open(&file)?;
    let path = text(&file);
    let low = low(file.to_str().expect("UTF-8"));
    let (suid, sgid) = (0o4755_u32, 0o2755_u32);
    attempt(&format!("{place} chmod"), call(90, &[&path, &suid]));
    attempt(&format!("{place} fchmod"), call(91, &[&open.as_raw_fd(), &sgid]));
    attempt(&format!("{place} fchmodat"), call(268, &[&AT_FDCWD, &path, &suid]));
    attempt(&format!("{place} fchmodat2"), call(452, &[&AT_FDCWD, &path, &sgid, &0]));
    // The mode is an unsigned 16-bit number to the kernel: what is above it must not hide what is in it.
    attempt(&format!("{place} chmod wide"), call(90, &[&path, &(0xdead_0000_0000_4755_u64)]));
    attempt(&format!("{place} chmod x32"), call(0x4000_0000 | 90, &[&path, &suid]));
    attempt(&format!("{place} chmod 32-bit"), call32(15, low, suid, 0));
    attempt(&format!("{place} fchmod 32-bit"), call32(94, open.as_raw_fd() as u32, suid, 0));
    Ok(())
}

/// By calls that give a new file its mode, which no filter sees into in all cases: it is the outside that has to hold.
fn born_privileged(dir: &Path, place: &str) -> io::Result<()> {
    let opened = File::options().write(true).create_new(true).mode(0o6777).open(dir.join("opened"));
    attempt(&format!("{place} open"), opened);
    let regular = 0o100_000_u32 | 0o6777;
    attempt(&format!("{place} mknod"), call(133, &[&text(dir.join("mknod")), &regular, &0]));
    let how = [0o1_u64 | 0o100, 0o6777, 0];
    attempt(&format!("{place} openat2"), call(437, &[&AT_FDCWD, &text(dir.join("openat2")), &how.as_ptr(), &24]));
    attempt(&format!("{place} mkdir"), call(83, &[&text(dir.join("mkdir")), &0o6777_u32]));
    std::fs::write(dir.join("writable"), "by all\n")?;
    Ok(())
}

/// A capability that counts in a user namespace of the builder's own making only, which is why it may be given there.
pub fn capability() -> io::Result<()> {
    const NEW_USER: u64 = 0x1000_0000;
    let file = out();
    std::fs::write(&file, "x")?;
    // SAFETY: this process has one thread.
    let child = unsafe { sys::fork() };
    if child == 0 {
        let set = call(272, &[&NEW_USER])
            .and_then(|_| std::fs::write("/proc/self/uid_map", "0 1000 1"))
            .and_then(|()| std::fs::write("/proc/self/setgroups", "deny"))
            .and_then(|()| std::fs::write("/proc/self/gid_map", "0 100 1"))
            .and_then(|()| ring(&text(&file), &text("security.capability"), &CAPABILITY));
        attempt("capability", set);
        // SAFETY: ends the child.
        unsafe { sys::_exit(0) }
    }
    let mut status = 0_i32;
    call(61, &[&child, &(&raw mut status), &0, &0]).map(drop)
}

fn attributes(dir: &Path, place: &str) -> io::Result<()> {
    let file = dir.join("attributes");
    std::fs::write(&file, "x")?;
    let path = text(&file);
    let open = File::open(&file)?;
    let kinds = [("user.x", &b"1"[..]), ("system.posix_acl_access", &ACL), ("security.capability", &CAPABILITY)];
    for (name, value) in kinds {
        let (attribute, at, len) = (text(name), value.as_ptr(), value.len());
        attempt(&format!("{place} setxattr {name}"), call(188, &[&path, &attribute, &at, &len, &0]));
        attempt(&format!("{place} lsetxattr {name}"), call(189, &[&path, &attribute, &at, &len, &0]));
        attempt(&format!("{place} fsetxattr {name}"), call(190, &[&open.as_raw_fd(), &attribute, &at, &len, &0]));
        // struct xattr_args.
        let arguments = [at as u64, len as u64];
        let all: [&dyn sys::Argument; 6] = [&AT_FDCWD, &path, &0, &attribute, &arguments.as_ptr(), &16];
        attempt(&format!("{place} setxattrat {name}"), call(463, &all));
        attempt(&format!("{place} io_uring {name}"), ring(&path, &attribute, value));
    }
    Ok(())
}

/// Sets an attribute by a request to the kernel that is no call of its own, and so passes every filter of calls.
fn ring(path: &std::ffi::CStr, name: &std::ffi::CStr, value: &[u8]) -> io::Result<()> {
    const SETXATTR: u8 = 42;
    // struct io_uring_params: where the rings' parts lie is behind the first ten words.
    let mut params = [0_u32; 30];
    let ring = call(425, &[&4, &params.as_mut_ptr()])? as i32;
    let (tail, array, mask) = (params[11] as usize, params[16] as usize, params[12] as usize);
    let completions = (params[21] as usize, params[25] as usize);
    let submission = map(ring, 4096, 3, 0)?;
    let completion = map(ring, 4096, 3, 0x800_0000)?;
    let entries = map(ring, 4096, 3, 0x1000_0000)?;
    // SAFETY: offsets are the kernel's own; the entry is one of 64 zeroed bytes.
    unsafe {
        let _ = mask;
        entries.cast::<u8>().write(SETXATTR);
        entries.add(8).cast::<u64>().write_unaligned(value.as_ptr() as u64);
        entries.add(16).cast::<u64>().write_unaligned(name.as_ptr() as u64);
        entries.add(24).cast::<u32>().write_unaligned(value.len() as u32);
        entries.add(48).cast::<u64>().write_unaligned(path.as_ptr() as u64);
        submission.add(array).cast::<u32>().write(0);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        submission.add(tail).cast::<u32>().write_volatile(1);
        call(426, &[&ring, &1, &1, &1, &0, &0])?;
        // struct io_uring_cqe: a word of ours, then the result.
        let result = completion.add(completions.1 + 8).cast::<i32>().read_volatile();
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
}
