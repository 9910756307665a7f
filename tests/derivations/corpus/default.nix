# The corpus: derivations that each exercise one thing that a builder has to do as Nix does it. One file is one subject.
#
# `tools` is a directory whose bin has a static busybox under the names of its applets. The result says of every case
#   drv      path of its .drv file
#   expect   the status that it ends with in Nix 2.34
#   limits   what the client asks for beside it: timeout and silent in seconds, log in bytes
#   local    why a request to a cluster cannot express it, or ends differently there; null if it can
#   built    why `drover build` cannot do it; null if it can
{ tools }:
let
  lib = import ./lib.nix (builtins.path { name = "tools"; path = /. + tools; });
  subjects = {
    environment = import ./environment.nix lib;
    arguments = import ./arguments.nix lib;
    files = import ./files.nix lib;
    structured = import ./structured.nix lib;
    graph = import ./graph.nix lib;
    outputs = import ./outputs.nix lib;
    trees = import ./trees.nix lib;
    references = import ./references.nix lib;
    fixed = import ./fixed.nix lib;
    floating = import ./floating.nix lib;
    impure = import ./impure.nix lib;
    checks = import ./checks.nix lib;
    refused = import ./refused.nix lib;
    failures = import ./failures.nix lib;
    builtin = import ./builtin.nix lib;
    machine = import ./machine.nix lib;
  };
  describe = name: case: let this = case name; in {
    inherit name;
    value = {
      drv = builtins.unsafeDiscardStringContext this.drv.drvPath;
      inherit (this) expect;
      limits = this.limits or { };
      local = this.local or null;
      built = this.built or null;
    };
  };
  all = subject: cases: builtins.map (name: describe "${subject}-${name}" cases.${name}) (builtins.attrNames cases);
in builtins.listToAttrs (builtins.concatMap (subject: all subject subjects.${subject}) (builtins.attrNames subjects))
