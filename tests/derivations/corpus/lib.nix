# What the subjects share. A case is a function of its name, which becomes the derivation's.
tools: rec {
  inherit tools;

  # A script for the sandbox's own shell, with busybox's applets in PATH.
  make = name: script: attrs: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    PATH = "${tools}/bin";
    args = [ "-ec" script ];
  } // attrs);

  ends = expect: script: attrs: name: { drv = make name script attrs; inherit expect; };
  builds = ends "Built";
  fails = ends "PermanentFailure";
  rejects = ends "OutputRejected";
  refuses = ends "InputRejected";

  # The same for a derivation that is there already.
  is = expect: drv: name: { inherit drv expect; };

  limited = limits: case: name: case name // { inherit limits; };
  # Not as a request to a cluster, for this reason; not by `drover build` either.
  local = why: case: name: case name // { local = why; };
  served = why: case: name: case name // { local = why; built = why; };

  floating = { __contentAddressed = true; outputHashMode = "nar"; outputHashAlgo = "sha256"; };
  fixed = mode: algo: hash: { outputHashMode = mode; outputHashAlgo = algo; outputHash = hash; };
  impure = { __impure = true; outputHashMode = "nar"; outputHashAlgo = "sha256"; };
  structured = { __structuredAttrs = true; };

  # For structured attributes: no variable of the derivation's is set, and the shell has no arrays. `$out` and PATH come
  # from the file.
  prelude = ''
    export PATH=${tools}/bin
    out=$(sed -n "s/^declare -A outputs=.*\['out'\]='\([^']*\)'.*/\1/p" "$NIX_ATTRS_SH_FILE")
  '';

  # Inputs to refer to: a source; an output that refers to it; one of two outputs that refers to that.
  source = builtins.toFile "source" "a source\n";
  leaf = make "leaf" "echo ${source} > $out" { };
  tree = make "tree" "mkdir -p $out/sub $dev; echo ${leaf} > $out/sub/file; echo $out > $dev/back" {
    outputs = [ "out" "dev" ];
  };
}
