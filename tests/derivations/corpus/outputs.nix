# Which outputs there are, what they are called, and what is wrong with some.
lib: with lib;
let all = outputs: { inherit outputs; }; in {
  several = builds "mkdir $out; echo $out > $dev; echo $dev $out > $doc" (all [ "out" "dev" "doc" ]);
  # `out` is not the first, or not there at all.
  order = builds "for o in $bin $out $a; do echo $o > $o; done" (all [ "bin" "out" "a" ]);
  without-out = builds "echo lib > $lib; echo $lib > $dev" (all [ "lib" "dev" ]);
  many = local "a BuildRequest has 16 outputs at most" (builds "for o in $outputs; do eval \"mkdir \\$$o; touch \\$$o/$o\"; done" (all (builtins.genList (n: "o${toString n}") 40)));
  odd-names = builds "tr '\\0' '\\n' < /proc/$$/environ | sed -n 's/^a[^=]*=//p' | while read p; do case $p in /nix/*) echo hi > $p; esac; done" (all [ "a-b" "a.b" "a+1" "a_" "a?" ]);
  missing = rejects "true" { };
  one-missing = rejects "echo > $out" (all [ "out" "dev" ]);
  cycle = rejects "echo $dev > $out; echo $out > $dev" (all [ "out" "dev" ]);
  long-cycle = rejects "echo $b > $a; echo $c > $b; echo $a > $c" (all [ "a" "b" "c" ]);
  is-itself = builds "echo $out > $out" { };
  others-and-itself = builds "echo $out $dev > $out; echo $dev > $dev" (all [ "out" "dev" ]);
  group-writable = rejects "echo > $out; chmod 664 $out" { };
  world-writable = rejects "mkdir $out; chmod 777 $out" { };
  # Below the top it does not matter.
  writable-below = builds "mkdir $out; echo > $out/f; chmod 666 $out/f; mkdir $out/d; chmod 777 $out/d" { };
  # What else lies in the store directory afterwards is nobody's.
  others = builds "(echo x > /nix/store/00000000000000000000000000000000-x) && echo possible > $out || echo impossible > $out" { };
  # Names at the edges of what a store path may have.
  name-with-every-character = name: builds "echo > $out" { name = "Az09+-._?=${name}"; } name;
  name-that-is-long = name: builds "echo > $out" { name = builtins.substring 0 207 (builtins.concatStringsSep "" (builtins.genList (_: "long") 60)); } name;
  name-with-a-dot = name: builds "echo > $out" { name = ".${name}"; } name;
  name-that-is-a-file = name: builds "echo > $out" { name = "${name}.tar.gz"; } name;
}
