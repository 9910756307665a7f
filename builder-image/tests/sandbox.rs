//! What a build sees, can do and cannot do, as root and as an ordinary user.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use common::{Builder, User, out};
use drover_serve::BuildStatus;

/// Runs a script as both users; its output file is what is compared.
fn seen(script: &str) -> Vec<String> {
    [User::Current, User::Ordinary]
        .into_iter()
        .map(|user| {
            let mut builder = Builder::start_with(user, &["--system-features", ""]);
            // A builder whose last process has no terminal left has ended: what follows keeps it.
            let drv = builder.derivation(&format!("{script}\ntrue"));
            let result = builder.build(&drv, &Default::default());
            assert_eq!(
                result.status,
                BuildStatus::Built,
                "{user:?}: {} {}",
                result.error_message,
                builder.log()
            );
            std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap()
        })
        .collect()
}

fn seen_alike(script: &str, expected: &str) {
    for text in seen(script) {
        assert_eq!(text.trim_end(), expected);
    }
}

#[test]
fn identity() {
    seen_alike(
        "(id -u; id -g; hostname; cat /proc/sys/kernel/domainname; pwd; echo $$; umask; ulimit -c) > $out",
        "1000\n100\nlocalhost\n(none)\n/build\n1\n0022\n0",
    );
}

#[test]
fn no_rights_are_left() {
    seen_alike(
        "grep -E '^(CapInh|CapPrm|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status > $out",
        "CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\n\
         CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2",
    );
}

#[test]
fn the_tree() {
    seen_alike(
        "(ls /; ls /etc; ls /dev; ls /nix/store | wc -l; cat /etc/hosts; cat /etc/passwd; cat /etc/group) > $out",
        "bin\nbuild\ndev\netc\nnix\nproc\ntmp\n\
         group\nhosts\npasswd\n\
         fd\nfull\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n\
         2\n\
         127.0.0.1 localhost\n::1 localhost\n\
         root:x:0:0:Nix build user:/build:/noshell\n\
         nixbld:x:1000:100:Nix build user:/build:/noshell\n\
         nobody:x:65534:65534:Nobody:/:/noshell\n\
         root:x:0:\nnixbld:!:100:\nnogroup:x:65534:",
    );
}

#[test]
fn only_its_own_processes_and_network() {
    seen_alike(
        "(set -- /proc/[0-9]*; echo $#; ls /proc/self/fd | wc -l; grep -c : /proc/net/dev; \
          ip addr show lo | grep -c 'inet 127.0.0.1'; ping -c1 -W1 192.0.2.1 2>&1 | tail -1 | cut -c1-30 | wc -l) \
         > $out",
        // This shell and its subshell; the standard three and the directory being listed.
        "2\n4\n1\n1\n1",
    );
}

#[test]
fn files_that_a_store_cannot_keep_are_refused() {
    seen_alike(
        "touch f; (chmod 4755 f 2>&1 | grep -c 'not permitted'; chmod g+s f 2>&1 | grep -c 'not permitted'; \
          chmod 755 f && echo ok) > $out",
        "1\n1\nok",
    );
}

#[test]
fn inputs_cannot_be_changed_even_by_their_owner() {
    seen_alike(
        "cd /nix/store/*-tools; (touch bin/x || echo touch; rm bin/sh || echo rm; chmod 777 bin || echo chmod) > $out 2>/dev/null",
        "touch\nrm\nchmod",
    );
}

#[test]
fn nothing_of_the_machine_can_be_mounted_over_or_seen() {
    seen_alike(
        "(mount -t tmpfs x /build || echo mount; umount /proc || echo umount; chroot / true || echo chroot; \
          echo x > /etc/hosts || echo etc) 2>/dev/null > $out",
        "mount\numount\nchroot\netc",
    );
}

#[test]
fn shared_memory_and_terminals() {
    seen_alike(
        "(echo x > /dev/shm/f && cat /dev/shm/f; test -c /dev/ptmx && echo ptmx; stat -c %a /dev/shm; \
          test -t 1 || echo file; test -t 2 && echo tty) > $out",
        "x\nptmx\n1777\nfile\ntty",
    );
}
