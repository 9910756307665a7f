# Real C software by a compiler that is itself an input: the SQLite amalgamation by tcc, linked against a C library
# from a store path, and then used by a third derivation. Three links of a chain with runtime references.
#
# Arguments are directories: `tcc` (bin/tcc, lib/tcc), `libc` (include, lib with the loader) and `sqlite` (sqlite3.c).
{ tcc, libc, sqlite }:
let
  source = name: path: builtins.path { inherit name path; };
  compiler = source "tcc" (/. + tcc);
  library = source "libc" (/. + libc);
  amalgamation = source "sqlite-source" (/. + sqlite);
  loader = "${library}/lib/ld-linux-x86-64.so.2";
  # The loader runs the compiler, so that nothing outside the inputs is needed; LD_SO is what tcc writes into programs.
  compile = name: args: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = loader;
    LD_SO = loader;
    args = [
      "--library-path" "${library}/lib" "${compiler}/bin/tcc" "-B${compiler}/lib/tcc"
      "-nostdinc" "-I${compiler}/lib/tcc/include" "-I${library}/include" "-I${amalgamation}"
    ] ++ args ++ [ "-o" (builtins.placeholder "out") ];
  };
  object = compile "sqlite3.o" [
    "-DSQLITE_THREADSAFE=0" "-DSQLITE_OMIT_LOAD_EXTENSION" "-c" "${amalgamation}/sqlite3.c"
  ];
  query = compile "sqlite-query" [
    "-nostdlib" "-Wl,-rpath=${library}/lib" "-L${library}/lib"
    "${library}/lib/crt1.o" "${library}/lib/crti.o"
    "${./query.c}" "${object}" "-lc" "-lm" "${compiler}/lib/tcc/libtcc1.a"
    "${library}/lib/crtn.o"
  ];
in {
  inherit object query;
  database = derivation {
    name = "sqlite-database";
    system = "x86_64-linux";
    builder = query;
    args = [
      (builtins.placeholder "out")
      "create table builds (name, seconds); insert into builds values ('object', 1), ('query', 2); select sum(seconds) from builds;"
    ];
  };
}
