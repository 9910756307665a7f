fn main() {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    for crd in drover_api::crds() {
        writeln!(out, "---").unwrap();
        out.write_all(serde_yaml::to_string(&crd).unwrap().as_bytes()).unwrap();
    }
}
