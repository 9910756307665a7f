# Impure derivations: with the network, built anew each time, named by what they turn out to be.
lib: with lib;
let input = make "impure-input" "echo impure > $out" impure; in {
  plain = builds "echo impure > $out" impure;
  environment = builds "[ \"$CORPUS_UNSET\" = '' ]; cat /proc/$$/environ > $out" (impure // { impureEnvVars = [ "CORPUS_UNSET" ]; });
  references = builds "echo ${leaf} $dev > $out; echo dev > $dev" (impure // { outputs = [ "out" "dev" ]; });
  chain = local "what an impure input came to is written down nowhere, so that a request cannot name it" (builds "cat ${input} > $out; echo ${input} >> $out" impure);
  sees-the-network = builds "cat /etc/nsswitch.conf > $out" impure;
  that-fails = ends "TransientFailure" "exit 1" impure;
}
