# Prints what a builder can see of where it runs, one thing a line: `subject: …`. What is not the same from one run to the
# next (numbers of processes and mounts, inodes, times, sizes of temporary file systems) is left out here.
{ tools, network ? false }:
let lib = import ./corpus/lib.nix (builtins.path { name = "tools"; path = /. + tools; });
in lib.make "visible" ''
  say() { sed "s|^|$1: |"; }
  {
    cat /proc/$$/environ | tr '\0' '\n' | say environment
    cat /proc/$$/cmdline | tr '\0' '\n' | head -n 2 | say argument
    # Place, what is forbidden, whether it is shared; of the types only those that are no machine's choice.
    while read -r _ _ _ _ place options rest; do
      flags=; for flag in ro nosuid nodev noexec; do case ,$options, in *,$flag,*) flags="$flags $flag"; esac; done
      case " $rest" in *' shared:'*) flags="$flags shared"; esac
      case "$rest" in *'- proc '*) flags="$flags proc";; *'- devpts '*) flags="$flags devpts";; *'- sysfs '*) flags="$flags sysfs"; esac
      echo "$place$flags"
    done < /proc/self/mountinfo | sed 's|/[a-z0-9]*-tools|/tools|' | say mount
    id | say id
    grep -E '^(Umask|TracerPid|Uid|Gid|FDSize|Groups|NStgid|NSpid|NSpgid|NSsid|Threads|SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt|Cap|NoNewPrivs|Seccomp|Speculation)' /proc/$$/status | tr '\t' ' ' | say status
    tr -s ' ' < /proc/$$/limits | say limit
    cat /proc/$$/uid_map | tr -s ' ' | cut -d ' ' -f 2,4 | say uid_map
    cat /proc/$$/gid_map | tr -s ' ' | cut -d ' ' -f 2,4 | say gid_map
    cat /proc/$$/setgroups | say setgroups
    cat /proc/$$/oom_score_adj | say oom_score_adj
    cat /proc/$$/personality | say personality
    cat /proc/$$/coredump_filter | say coredump_filter
    sed 's/ [0-9]* / N /g' /proc/$$/cgroup | say cgroup
    # Own process, parent, group, session, terminal.
    set -- $(sed 's/.*) //' /proc/$$/stat); echo "parent $2 group $3 session $4 terminal $5 nice ''${17} policy ''${39}" | say process
    ls /proc | grep -v '^[0-9]*$' | say proc
    for name in kernel/hostname kernel/domainname kernel/ns_last_pid kernel/overflowuid net/ipv4/ip_forward net/core/somaxconn user/max_user_namespaces kernel/cap_last_cap; do
      [ -e /proc/sys/$name ] && echo "$name $([ $name = kernel/ns_last_pid ] && echo there || cat /proc/sys/$name)" || echo "$name absent"
    done | say sysctl
    (echo 1 > /proc/sys/kernel/domainname) 2> /dev/null && echo yes | say 'can write sysctl'
    for dir in / /bin /build /dev /dev/pts /dev/shm /etc /nix /proc /sys /tmp /root /home /homeless-shelter /path-not-set /var /run /usr; do
      [ -e $dir ] && stat -c '%n %A %u %g' $dir || echo "$dir absent"
    done | say directory
    find / -xdev -maxdepth 1 ! -path / -exec stat -c '%n %F' {} + | sort | say root
    find /dev ! -path '/dev/pts/*' ! -type l -exec stat -c '%n %F %a %u %g %t,%T' {} + | sort | say dev
    for link in /dev/fd /dev/stdin /dev/stdout /dev/stderr /dev/ptmx; do echo "$link -> $(readlink $link)"; done | say link
    find /etc -type f -exec stat -c '%n mode %a' {} + | sort | say etc
    find /etc -type f -exec stat -c '%n owner %u:%g' {} + | sort | say etc
    for file in passwd group hosts nsswitch.conf; do [ -e /etc/$file ] && sed "s|^|$file |" /etc/$file; done | say etc
    stat -c '%n %A %u %g' /nix/store | say store
    find /nix/store -maxdepth 1 ! -path /nix/store -exec stat -c '%n %A %u %g' {} + | sed 's/visible.*-tools/tools/' | sort | say store
    find /build -exec stat -c '%n %A %u %g' {} + | say build
    find /tmp | say tmp
    # In two steps, or the shell is seen with the pipes that it is about to give away.
    ls -l /proc/$$/fd > /build/descriptors
    sed 's/.* \([0-9]*\) -> /\1 /; s|^0 .*/null$|0 null|; s/:\[[0-9]*\]/:N/; s|/dev/pts/[0-9]*|/dev/pts/N|' /build/descriptors | grep -v '^total' | say descriptor
    for fd in 0 1 2; do [ -t $fd ] && echo "$fd is a terminal" || echo "$fd is none"; done | say descriptor
    (stty -a < /proc/$$/fd/2 | tr ';' '\n' | grep -v speed) 2>&1 | say terminal
    pwd | say cwd
    umask | say umask
    hostname | say hostname
    uname -a | sed 's/#.*//' | say uname
    tail -n +3 /proc/net/dev | sed 's/:.*//' | tr -d ' ' | say interface
    ip addr show lo 2>&1 | grep -o 'inet6* [^ ]*\|<[^>]*>' | say loopback
    ip route 2>&1 | wc -l | say routes
    ls -1 /proc/self/ns | say namespace
    for ns in cgroup ipc mnt net pid user uts; do
      a=$(readlink /proc/$$/ns/$ns); echo "$ns $a"
    done | sed 's/\[[0-9]*\]/[N]/' | say namespaces
    for what in "mount -t tmpfs x /build" "mount -t proc x /build" "unshare -U true" "unshare -n true" "chroot / true" "hostname x" "mknod /build/n c 1 3" "kill -0 -1" "ping -c 1 -W 1 127.0.0.1" "chown 0:0 /build" "nice -n -5 true" "chmod 4755 /build" "setfattr -n user.a -v b /build" "getfattr -n user.a /build"; do
      $what > /dev/null 2>&1 && echo "$what: can" || echo "$what: cannot"
    done | say act
  } > $out
'' (if network then lib.impure else { })
