# Builders that fail, and by what.
lib: with lib;
let deaf = "trap '' TERM INT HUP; while :; do sleep 1; done"; in {
  exit-1 = fails "exit 1" { };
  exit-100 = fails "echo output first > $out; exit 100" { };
  exit-255 = fails "exit 255" { };
  # The first process of a namespace hears only from outside. One without its outputs has ended, for who listens there.
  closes-its-log = fails "echo > $out; exec > /dev/null 2>&1; sleep 1000" { };
  leaves-others-behind = builds "sleep 1000 > /dev/null 2>&1 & echo > $out" { };
  no-builder = fails "" { builder = "/no/such/builder"; };
  builder-is-no-program = fails "" { builder = source; };
  builder-is-a-directory = fails "" { builder = "${tools}/bin"; };
  builder-of-no-input = fails "" { builder = "/nix/store/00000000000000000000000000000000-none/bin/sh"; };
  script-without-an-interpreter = fails "" { builder = make "script" "printf '#!/no/such/interpreter\\n' > $out; chmod 755 $out" { }; };
  script = builds "" { builder = make "script" "printf '#!/bin/sh\\necho \"$0 $*\" > $out\\n' > $out; chmod 755 $out" { }; args = [ "a" "b c" ]; };
  time = limited { timeout = 2; } (ends "TimedOut" "while :; do echo on; sleep 0.1; done" { });
  time-of-the-deaf = limited { timeout = 2; } (ends "TimedOut" deaf { });
  time-enough = limited { timeout = 100; silent = 100; } (builds "sleep 0.2; echo > $out" { });
  silence = limited { silent = 2; } (ends "TimedOut" "echo once; sleep 1000" { });
  silence-broken = limited { silent = 3; } (builds "for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo $i; done; echo > $out" { });
  log = limited { log = 20000; } (ends "LogLimitExceeded" "yes" { });
  log-within = limited { log = 20000; } (builds "head -c 19000 /dev/zero | tr '\\0' x; echo > $out" { });
  fixed-time = limited { timeout = 2; } (ends "TimedOut" deaf (fixed "flat" "sha256" (builtins.hashString "sha256" "")));
}
