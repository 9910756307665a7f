//! A picture of the Grafana dashboard: every panel's own queries, answered by a real Prometheus over samples that were made up
//! ([`played`]), drawn by what stands in for Grafana here.

mod played;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::prometheus::Prometheus;

const DASHBOARD: &str = "charts/drover/files/dashboard.json";
/// Panels beside each other, and the size of one.
const COLUMNS: usize = 3;
const WIDTH: usize = 400;
const HEIGHT: usize = 190;
/// Seconds between two points.
const STEP: u32 = 300;
const COLOURS: [&str; 8] =
    ["#2f6fb3", "#d1832f", "#4a9a57", "#b5464b", "#7d62a8", "#8a6d4f", "#c36ba6", "#6f7780"];
/// Series that a panel names.
const MAX_NAMES: usize = 8;

/// Draws it into the file. Fails for a panel that shows nothing.
pub fn draw(out: &Path) -> Result<()> {
    let path = crate::checkout().join(DASHBOARD);
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    let prometheus = Prometheus::start(None, Some(&played::samples()))?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let mut drawn = String::new();
    let mut count = 0;
    for panel in panels.iter().filter(|panel| panel["type"] == "timeseries") {
        let title = panel["title"].as_str().unwrap_or_default();
        let mut lines = Vec::new();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().context("a query")?;
            let query = query.replace("$__rate_interval", "10m").replace("$namespace", ".*");
            let legend = target["legendFormat"].as_str().unwrap_or_default();
            for series in prometheus.query_range(&query, played::START + 3600, played::END, STEP)? {
                let values = series["values"].as_array().into_iter().flatten();
                let points =
                    values.filter_map(|point| Some((point[0].as_f64()?, point[1].as_str()?.parse().ok()?)));
                lines.push((name(legend, &series["metric"]), points.collect::<Vec<(f64, f64)>>()));
            }
        }
        ensure!(lines.iter().any(|(_, points)| points.len() > 1), "panel {title:?} shows nothing");
        panel_at(
            &mut drawn,
            count,
            title,
            panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or_default(),
            &lines,
        )?;
        count += 1;
    }
    let (width, height) = (COLUMNS * WIDTH, count.div_ceil(COLUMNS) * HEIGHT);
    let svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{drawn}</svg>\n"
    );
    fs::write(out, svg).with_context(|| format!("could not write {}", out.display()))
}

fn panel_at(
    svg: &mut String,
    at: usize,
    title: &str,
    unit: &str,
    lines: &[(String, Vec<(f64, f64)>)],
) -> Result<()> {
    let (left, top) = (at % COLUMNS * WIDTH, at / COLUMNS * HEIGHT);
    let most = lines
        .iter()
        .flat_map(|(_, points)| points)
        .map(|(_, value)| *value)
        .filter(|value| value.is_finite());
    let most = most.fold(0.0, f64::max).max(1e-9);
    writeln!(svg, "<g transform=\"translate({left},{top})\">")?;
    writeln!(svg, "<text x=\"10\" y=\"18\" font-size=\"12\" font-weight=\"bold\">{}</text>", escape(title))?;
    writeln!(svg, "<text x=\"10\" y=\"34\" fill=\"#666\">{}</text>", said(most, unit))?;
    writeln!(svg, "<path d=\"M10 38H390M10 140H390\" stroke=\"#ccc\" fill=\"none\"/>")?;
    for (number, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let mut path = String::new();
        for (time, value) in points.iter().filter(|(_, value)| value.is_finite()) {
            let span = (played::END - played::START - 3600) as f64;
            let x = 10.0 + 380.0 * (time - (played::START + 3600) as f64) / span;
            let y = 140.0 - 100.0 * value / most;
            write!(path, "{}{x:.0} {y:.0}", if path.is_empty() { "M" } else { "L" })?;
        }
        writeln!(svg, "<path d=\"{path}\" stroke=\"{colour}\" fill=\"none\"/>")?;
        if number < MAX_NAMES {
            let (x, y) = (10 + number % 3 * 128, 154 + number / 3 * 13);
            writeln!(svg, "<text x=\"{x}\" y=\"{y}\" fill=\"{colour}\">{}</text>", escape(name))?;
        }
    }
    svg.push_str("</g>\n");
    Ok(())
}

/// The legend with the series' labels filled in.
fn name(legend: &str, labels: &Value) -> String {
    let mut name = legend.to_owned();
    for (key, value) in labels.as_object().into_iter().flatten() {
        name = name.replace(&format!("{{{{{key}}}}}"), value.as_str().unwrap_or_default());
    }
    name
}

fn said(value: f64, unit: &str) -> String {
    match unit {
        "s" => format!("{value:.2} s"),
        "Bps" => format!("{:.1} MB/s", value / 1e6),
        "cpm" => format!("{value:.1} a minute"),
        "reqps" => format!("{value:.1} a second"),
        _ => format!("{value:.1}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
