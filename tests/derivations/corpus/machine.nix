# What a builder finds around itself, as far as it is the same everywhere, and attributes that only steer the scheduler.
lib: with lib; {
  architecture = builds "uname -m > $out" { };
  i686 = builds "uname -m > $out; cat /proc/self/personality >> $out" { system = "i686-linux"; };
  level = builds "uname -m > $out" { system = "x86_64-v1-linux"; };
  identity = builds "{ id; hostname; cat /proc/sys/kernel/domainname; pwd; umask; echo $$; ulimit -c; tty < /dev/stdin || :; } > $out" { };
  files = builds "{ cat /etc/passwd /etc/group /etc/hosts; ls -a / /etc /tmp /bin; ls /dev | grep -vx kvm; } > $out" { };
  only-its-inputs = builds "ls -a /nix /nix/store > $out" { inherit leaf; };
  network = builds "{ ls /sys || :; sed 's/:.*//' /proc/net/dev | tail -n +3; ip addr show lo | grep inet; } > $out 2>&1" { };
  processes = builds "{ set -- /proc/[0-9]*; echo $#; } > $out" { };
  writes = builds ''
    for file in /a /etc/a /etc/hosts /tmp/a /bin/a /dev/a /nix/a /proc/a ${leaf} ${tree}/a /build/a /dev/shm/a; do
      if (echo x >> $file) 2> /dev/null; then echo can write $file; else echo cannot write $file; fi
    done > $out
  '' { };
  local-only = builds "echo > $out" { preferLocalBuild = true; allowSubstitutes = false; };
  other-systems = builds "echo > $out" { __darwinAllowLocalNetworking = true; __sandboxProfile = "(allow everything)"; __propagatedSandboxProfile = ""; };
  descriptors = builds "ls /proc/self/fd | tr '\\n' ' ' > $out; [ /dev/null -ef /proc/$$/fd/0 ]" { };
}
