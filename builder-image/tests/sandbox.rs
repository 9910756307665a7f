//! What a build sees, can do and cannot do, as root and as an ordinary user.

#![allow(clippy::unwrap_used)] // all of it is tests

mod common;

use std::time::{Duration, Instant};

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

#[test]
fn paths_of_the_machine_that_builds_may_see() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(dir.path().join("a"), "seen\n").unwrap();
    std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
    let paths = format!(
        "/opt/here={0} /etc/motd={0}/a /opt/link={0}/link /absent=/no/such/path?",
        dir.path().display()
    );
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start_with(user, &["--sandbox-paths", &paths]);
        let script =
            "(cat /opt/here/a /etc/motd; readlink /opt/link; test -e /absent || echo absent; ls /opt) > $out";
        let drv = builder.derivation(&format!("{script}\ntrue"));
        let result = builder.build(&drv, &Default::default());
        assert_eq!(result.status, BuildStatus::Built, "{user:?}: {} {}", result.error_message, builder.log());
        let text = std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap();
        assert_eq!(text, "seen\nseen\na\nabsent\nhere\nlink\n");

        let mut builder = Builder::start_with(user, &["--sandbox-paths", "/a=/no/such/path"]);
        let result = builder.run("echo > $out");
        assert!(result.error_message.contains("/no/such/path"), "{}", result.error_message);
    }
}

/// Directories of control groups of this process's, by the lines of its `/proc/self/cgroup` that have one below /sys.
fn unified_group() -> Option<std::path::PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    Some(std::path::Path::new(mount.split(' ').nth(1)?).join(path.trim_start_matches('/')))
}

#[test]
fn a_control_group_of_its_own_where_there_can_be_one() {
    let groups =
        |text: &str| text.lines().map(|line| line.rsplit(':').next().unwrap().to_owned()).collect::<Vec<_>>();
    for (user, args) in
        [(User::Current, &[][..]), (User::Ordinary, &[]), (User::Current, &["--no-use-cgroups"])]
    {
        let mut builder = Builder::start_with(user, args);
        let drv = builder.derivation("cat /proc/self/cgroup > $out\ntrue");
        let result = builder.build(&drv, &Default::default());
        assert_eq!(result.status, BuildStatus::Built, "{user:?}: {} {}", result.error_message, builder.log());
        let seen = std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap();
        let outside = std::fs::read_to_string(format!("/proc/{}/cgroup", builder.child.id())).unwrap();
        // Root of this machine may make groups, but for root of a container to whom they are read-only.
        let probe = unified_group().map(|dir| dir.join(format!("drover-test-{}", std::process::id())));
        let can =
            probe.is_some_and(|dir| std::fs::create_dir(&dir).is_ok() && std::fs::remove_dir(&dir).is_ok());
        if can && is_root() && user == User::Current && args.is_empty() {
            assert!(groups(&seen).iter().all(|group| group == "/"), "{seen}");
        } else {
            assert_eq!(groups(&seen), groups(&outside), "{user:?} {args:?}");
        }
        let name = format!("drover-build-{}-", builder.child.id());
        let left = unified_group().into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap().flatten());
        assert!(left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&name)).count() == 0);
    }
}

/// Starts a process that outlives its parents' groups, sessions and signals, and says its marker in its command line.
fn survivor(marker: &str) -> String {
    // By way of a process that goes at once, so that nothing in the build is its parent.
    format!(
        "(setsid sh -c 'trap \"\" HUP TERM INT; sleep {marker}; sleep {marker}' </dev/null >/dev/null 2>&1 &) &"
    )
}

/// Whether any process of this machine has this word in its command line, and what it is if so.
fn found(marker: &str) -> Option<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let mut lines = processes.filter_map(|path| {
        let line = String::from_utf8_lossy(&std::fs::read(path.join("cmdline")).ok()?).replace('\0', " ");
        line.contains(marker).then(|| format!("{}: {line}", path.display()))
    });
    lines.next()
}

/// The answer comes when all is dead.
fn nothing_survives(builder: &mut Builder, marker: &str) {
    let script = format!(
        "{}\nuntil ps -o args | grep -v grep | grep -q '^sleep {marker}'; do :; done; echo done > $out",
        survivor(marker)
    );
    let drv = builder.derivation(&script);
    let result = builder.build(&drv, &Default::default());
    assert_eq!(result.status, BuildStatus::Built, "{} {}", result.error_message, builder.log());
    assert_eq!(found(marker), None);
}

#[test]
fn what_a_build_leaves_running_is_killed() {
    nothing_survives(&mut Builder::start(User::Current), "8643001");
    nothing_survives(&mut Builder::start(User::Ordinary), "8643002");
}

#[test]
fn the_kernel_would_kill_a_build_before_its_server() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start(user);
        let before: i32 =
            score(&std::fs::read_to_string(format!("/proc/{}/oom_score_adj", builder.child.id())).unwrap());
        let drv = builder.derivation("cat /proc/self/oom_score_adj > $out");
        assert_eq!(builder.build(&drv, &Default::default()).status, BuildStatus::Built);
        let within = score(&std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap());
        assert_eq!(within, (before + 100).min(1000));
    }
}

fn score(text: &str) -> i32 {
    text.trim().parse().unwrap()
}

#[test]
fn builds_for_32_bits_are_told_so() {
    for user in [User::Current, User::Ordinary] {
        let mut builder = Builder::start_with(user, &["--extra-platforms", "i686-linux"]);
        let mut drv = builder.derivation("uname -m > $out");
        drv.system = "i686-linux".into();
        let result = builder.build(&drv, &Default::default());
        assert_eq!(result.status, BuildStatus::Built, "{} {}", result.error_message, builder.log());
        assert_eq!(std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap(), "i686\n");
    }
}

/// What a build sees and can do that its root directory decides, inside namespaces of its own making too.
const WITHIN: &str = "set +e; (ls / /dev /nix; cut -d' ' -f5 /proc/self/mountinfo; readlink /proc/self/root /proc/self/cwd; ls /proc/1/root; \
     id -u; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status; mount -t tmpfs x /tmp || echo mount; \
     umount / || echo umount; chroot / true || echo chroot; ls /../..; \
     unshare -Urm sh -c 'echo within; umount -l / && echo gone; umount / && echo gone; mount -t sysfs x /tmp && echo sysfs; \
       mount --move / /tmp && echo moved; ls /..; chroot /.. ls /; \
       mount -t tmpfs x /tmp && mkdir /tmp/a && pivot_root /tmp /tmp/a && echo /* /a/* /a/tmp/* > /a/build/pivoted'; \
     unshare -Urmn sh -c 'echo alone; mount -t sysfs x /tmp && echo sysfs'; cat pivoted) 2>/dev/null > $out\ntrue";

#[test]
fn with_the_right_to_mount_under_a_filter_it_is_nested_admin_and_the_same() {
    let built = |mut builder: Builder| {
        let drv = builder.derivation(WITHIN);
        let result = builder.build(&drv, &Default::default());
        assert_eq!(result.status, BuildStatus::Built, "{} {}", result.error_message, builder.log());
        (std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap(), builder.finish())
    };
    // Whoever has no SYS_ADMIN has no rung there: the trial finds out what a build would.
    let why = Builder::start_filtered(User::Ordinary, libc::SYS_pivot_root, &["--sandbox", "nested-admin"])
        .run("echo > $out")
        .error_message;
    for part in ["none works here", "(pivot_root)", "does not have SYS_ADMIN"] {
        assert!(why.contains(part), "no {part:?} in {why}");
    }
    if !is_root() {
        return;
    }
    let why =
        Builder::start_filtered(User::Current, libc::SYS_pivot_root, &[]).run("echo > $out").error_message;
    for part in ["must be `nested` or stronger", "`nested-admin` is the strongest", "seccomp filter"] {
        assert!(why.contains(part), "no {part:?} in {why}");
    }
    let (nested, log) = built(Builder::start(User::Current));
    assert!(!log.contains("the sandbox is"), "{log}");
    let (nested, pivoted) = nested.rsplit_once("\n/").unwrap();
    assert!(nested.contains("within") && pivoted.starts_with("a /a/bin /a/build"), "{nested}{pivoted}");
    // One filter lets the build itself try pivot_root, the other lets neither.
    for (refused, more) in [(libc::SYS_keyctl, format!("\n/{pivoted}")), (libc::SYS_pivot_root, "\n".into())]
    {
        let (by_admin, log) =
            built(Builder::start_filtered(User::Current, refused, &["--sandbox", "nested-admin"]));
        assert!(log.contains("the sandbox is `nested-admin`"), "{log}");
        assert_eq!(by_admin, format!("{nested}{more}"));
    }
}

/// Whether this machine lets us have a pod with more than one id in it.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_pod_that_cannot_nest_is_refused_unless_the_rung_is_allowed() {
    let mut builder = Builder::start_in_pod(&[]);
    let result = builder.run("echo > $out");
    assert_eq!(result.status, BuildStatus::MiscFailure, "{}", builder.log());
    let why = &result.error_message;
    let mut parts = vec!["must be `nested` or stronger", "mount a fresh /proc", "procMount: Unmasked"];
    parts.extend(if is_root() {
        &["`pod` is the strongest that works", "--sandbox pod", "sandbox: Pod"][..]
    } else {
        &["none works here", "cannot change ids"]
    });
    for part in parts {
        assert!(why.contains(part), "no {part:?} in {why}");
    }
    // It stays so, and nothing was built.
    assert_eq!(builder.run("echo again > $out").error_message, *why);
}

#[test]
fn the_pod_as_the_sandbox() {
    let mut builder = Builder::start_in_pod(&["--sandbox", "pod"]);
    let script = "(id -u; id -g; pwd; echo $NIX_BUILD_TOP; umask; cat /proc/sys/kernel/ostype; \
         grep -E '^(Groups|CapInh|CapPrm|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status; ls /proc/self/fd | wc -l; \
         echo x > /tmp/f && cat /tmp/f; echo y > f && mv f /tmp/g && cat /tmp/g; \
         touch f; chmod 4755 f 2>&1 | grep -c 'not permitted'; \
         cd /nix/store/*-tools; touch bin/x || echo touch; rm bin/sh || echo rm; \
         ls /nix/var || echo state; cat /nix/var/nix/db/db.sqlite || echo database; ls /usr || echo usr; \
         ls / || echo root; echo x > /etc/passwd || echo etc; kill -9 1 || echo kill; cat /proc/1/environ || echo environ; \
         nc 127.0.0.1 9 2>&1 | grep -c 'Address family not supported') 2>/dev/null > $out\ntrue";
    let drv = builder.derivation(script);
    let result = builder.build(&drv, &Default::default());
    if !is_root() {
        assert!(result.error_message.contains("cannot change ids"), "{}", result.error_message);
        return;
    }
    assert_eq!(result.status, BuildStatus::Built, "{} {}", result.error_message, builder.log());
    let expected = "30001\n30000\n/build\n/build\n0022\nLinux\nGroups:\t \nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
         CapEff:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n4\nx\ny\n1\ntouch\nrm\nstate\n\
         database\nusr\nroot\netc\nkill\nenviron\n1\n";
    assert_eq!(std::fs::read_to_string(builder.store_file(&out(&drv))).unwrap(), expected);

    // There is no second build, and the first one's outputs stay.
    let again = builder.run("echo second > $out");
    assert_eq!(again.status, BuildStatus::MiscFailure);
    assert!(again.error_message.contains("Start another builder"), "{}", again.error_message);
    assert_eq!(builder.build(&drv, &Default::default()).status, BuildStatus::AlreadyValid);
}

#[test]
fn the_pod_needs_the_store_where_builds_expect_it() {
    let mut builder = Builder::start_in_pod(&["--sandbox", "pod", "--store", "/tmp/elsewhere"]);
    let why = builder.run("echo > $out").error_message;
    for part in ["none works here", "store has to be at /nix/store", "--store local"] {
        assert!(why.contains(part), "no {part:?} in {why}");
    }
}

#[test]
fn what_a_build_leaves_running_in_the_pod_is_killed() {
    if is_root() {
        nothing_survives(&mut Builder::start_in_pod(&["--sandbox", "pod"]), "8643003");
        return;
    }
    // Builds have ids of their own there or are refused: what is left running cannot be told apart otherwise.
    let result = Builder::start_in_pod(&["--sandbox", "pod"]).run("echo > $out");
    assert!(result.error_message.contains("cannot change ids"), "{}", result.error_message);
}

#[test]
fn a_build_in_the_pod_that_is_too_slow_is_killed_with_all_that_it_started() {
    let mut builder = Builder::start_in_pod(&["--sandbox", "pod"]);
    let marker = "8643004";
    let script = format!("{}\nwhile :; do :; done", survivor(marker));
    let options = drover_serve::BuildOptions { timeout_seconds: 1, ..Default::default() };
    let begin = Instant::now();
    let result = builder.run_with(&script, &options);
    if !is_root() {
        assert!(result.error_message.contains("cannot change ids"), "{}", result.error_message);
        return;
    }
    assert_eq!(result.status, BuildStatus::TimedOut, "{}", result.error_message);
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert_eq!(found(marker), None);
}
