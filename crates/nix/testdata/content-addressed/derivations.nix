# What the .drv files beside this one come from: `nix-instantiate` of Nix 2.34.8 with the features ca-derivations,
# impure-derivations and dynamic-derivations, and `nix-store --realise`, which wrote what it resolved them to: of two
# files with one name, the one without input derivations. Which paths came out is in crates/nix/src/derivation/resolve.rs.
let
  d = a: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // a);
  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  base = d (floating // { name = "base"; outputs = [ "out" "dev" ]; args = [ "-c" "echo base > $out; echo dev > $dev" ]; });
  text = d (floating // { name = "plain.txt"; outputHashMode = "text"; args = [ "-c" "echo text > $out" ]; });
  impure = d { name = "impure"; __impure = true; args = [ "-c" "echo impure > $out" ]; };
  fixed = d { name = "fixed"; outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "x\n"; inherit base; args = [ "-c" "echo x > $out" ]; };
  # A chain of content-addressed ones, with the placeholder in an argument, in a value and next to itself.
  above = d (floating // { name = "above"; args = [ "-c" "echo ${base.dev}${base.dev}/x ${base} > $out" ]; inherit text; });
  deferred = d { name = "deferred"; outputs = [ "out" "lib" ]; inherit above fixed;
    args = [ "-c" "echo ${above} $lib > $out; echo lib > $lib" ]; };
  structured2 = d { name = "structured2"; __structuredAttrs = true; list = [ base.dev "é\"" ]; deferred = deferred.lib;
    args = [ "-c" "while read -r l; do case $l in *outputs=*) o=\${l#*out\\]=\\'}; o=\${o%%\\'*}; echo made > $o;; esac; done < $NIX_ATTRS_SH_FILE" ]; };
  of-impure = d { name = "of-impure"; __impure = true; inherit impure; args = [ "-c" "echo ${impure} > $out" ]; };
in { inherit base text impure fixed above deferred structured2 of-impure; }
