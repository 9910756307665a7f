# exportReferencesGraph of plain derivations.
lib: with lib;
let
  graph = value: { exportReferencesGraph = value; };
  dump = "cat graph > $out";
in {
  closure = builds dump (graph [ "graph" tree.dev ]);
  source = builds dump (graph [ "graph" source ]);
  several = builds "{ stat -c '%n %a %u %g' a b.c-d; cat a b.c-d; } > $out" (graph [ "a" leaf "b.c-d" tree ]);
  # A path below an object stands for the object.
  below = builds dump (graph [ "graph" "${tree}/sub/file" ]);
  # A .drv in the closure brings what it builds.
  of-a-derivation = builds dump (graph [ "graph" leaf.drvPath ]);
  of-a-file-of-a-derivation = local "it takes what the derivation builds, which its inputs do not name and a new store has not"
    (builds dump (graph [ "graph" (builtins.unsafeDiscardOutputDependency leaf.drvPath) ]));
  outside = refuses dump (graph [ "graph" (builtins.unsafeDiscardStringContext "${leaf}") ]);
  twice = builds dump (graph [ "graph" tree.dev "graph" source ]);
  empty = builds "echo > $out" (graph [ ]);
}
