# The derivation that hello.yaml asks for, in Nix's own language: `nix-instantiate hello.nix` gives the same output path.
derivation {
  name = "hello";
  system = "x86_64-linux";
  builder = "/bin/sh";
  args = [
    "-c"
    ''
      echo "building in $PWD as $(id -u):$(id -g)"
      mkdir "$out"
      echo "hello from $name" > "$out/greeting"
    ''
  ];
  PATH = "/bin";
}
