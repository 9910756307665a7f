# What the .drv and .json files beside this one come from: `nix-instantiate` of Nix 2.8.0, 2.26.3 and 2.34.8 (all made the
# same bytes) and `nix derivation show` of each.
let
  sys = "x86_64-linux";
  d = a: derivation ({ system = sys; builder = "/bin/sh"; } // a);
  src = builtins.toFile "input.txt" "plain text\n";
  fetch1 = d { name = "fetched"; outputHashMode = "recursive"; outputHashAlgo = "sha256"; outputHash = "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"; url = "one"; };
  fetch2 = d { name = "fetched"; outputHashMode = "recursive"; outputHashAlgo = "sha256"; outputHash = "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"; url = "two"; };
  flat = d { name = "flat.tar"; outputHashMode = "flat"; outputHashAlgo = "sha1"; outputHash = "0000000000000000000000000000000000000001"; };
  mid = f: d { name = "mid"; outputs = [ "out" "dev" ]; args = [ "-c" "echo \"quoted\" \\ back\ttab\r\n" f flat src ]; };
  leaf = d { name = "leaf"; a = (mid fetch1).dev; b = (mid fetch2).out; c = src; };
  attrs = d { name = "attrs"; __structuredAttrs = true; outputs = [ "out" "lib" ]; x = { b = 1; a = [ true null 1.5 "é/\n\u007f" ]; }; outputChecks = {}; };
in { inherit fetch1 fetch2 flat leaf attrs; mid1 = mid fetch1; mid2 = mid fetch2; }
