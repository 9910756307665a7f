# Builders that are part of Nix.
lib: with lib;
let
  builtin = expect: builder: attrs: name: { inherit expect; drv = derivation ({ inherit name; system = "builtin"; builder = "builtin:${builder}"; } // attrs); };
  flat = text: fixed "flat" "sha256" (builtins.hashString "sha256" text);
  file = builtins.toFile "file" "fetched\n";
  # A tree as packages make them.
  package = name: script: make name "mkdir -p $out/bin $out/share/doc; cd $out; ${script}" { };
  a = package "a" "echo a > bin/a; echo a > share/doc/a; mkdir lib; echo a > lib/a; touch .hidden";
  b = package "b" "echo b > bin/b; echo b > share/doc/b; echo info > share/info; mkdir -p nix-support; echo x > nix-support/setup-hook";
  c = package "c" "echo c > bin/a";
  d = package "d" "echo d > bin/d; mkdir nix-support; echo ${b} > nix-support/propagated-user-env-packages";
  forest = entries: { derivations = builtins.concatMap (e: [ e.active (toString e.priority) "1" "${e.package}" ]) entries; manifest = source; };
  entry = package: { active = "true"; priority = 5; inherit package; };
  channel = name: script: make "builtin-channel.tar" "mkdir t; cd t; ${script}; find . -exec touch -h -d @1 {} +; tar -c -f $out $(ls -A)" { };
in {
  unknown = builtin "PermanentFailure" "no-such-thing" { };
  fetchurl = builtin "Built" "fetchurl" ({ url = "file://${file}"; } // flat "fetched\n");
  fetchurl-executable = builtin "Built" "fetchurl" ({ url = "file://${file}"; executable = true; } // fixed "nar" null "sha256-c+yLEK4n1jzt7iJUtNJTMDs+pO+MNtns/Mr9SsUH8xk=");
  fetchurl-wrong-hash = builtin "OutputRejected" "fetchurl" ({ url = "file://${file}"; } // flat "something else\n");
  fetchurl-nothing-there = builtin "TransientFailure" "fetchurl" ({ url = "file:///no/such/file"; } // flat "fetched\n");
  fetchurl-without-a-hash = builtin "PermanentFailure" "fetchurl" { url = "file://${file}"; };
  fetchurl-impure = builtin "Built" "fetchurl" ({ url = "file://${file}"; } // impure);
  buildenv = builtin "Built" "buildenv" (forest [ (entry a) (entry b) ]);
  buildenv-priority = builtin "Built" "buildenv" (forest [ (entry a) (entry c // { priority = 4; }) ]);
  buildenv-collision = builtin "PermanentFailure" "buildenv" (forest [ (entry a) (entry c) ]);
  buildenv-inactive = builtin "Built" "buildenv" (forest [ (entry a) (entry c // { active = "false"; }) ]);
  buildenv-propagated = builtin "Built" "buildenv" (forest [ (entry d) ]);
  unpack-channel = builtin "Built" "unpack-channel" { channelName = "corpus"; src = channel "one" "mkdir -p x-1.0/sub; echo e > x-1.0/default.nix; ln -s default.nix x-1.0/link; echo s > x-1.0/sub/run; chmod 755 x-1.0/sub/run"; };
  unpack-channel-of-two = builtin "PermanentFailure" "unpack-channel" { channelName = "corpus"; src = channel "two" "mkdir a b"; };
  unpack-channel-bad-name = builtin "PermanentFailure" "unpack-channel" { channelName = "a/b"; src = channel "one" "mkdir a"; };
}
