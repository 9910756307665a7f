//! Medians, spreads and ratios of what was measured in turns, and the table that shows them.

/// What one side needed in each round, in seconds or another unit of which less is better.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series(pub Vec<f64>);

/// One line of the table: the same work by both sides.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub theirs: Side,
    pub ours: Side,
    /// How many times as fast the design wants us to be.
    pub reach: Option<f64>,
}

/// One side's figures for one kind of work.
#[derive(Clone, Debug, Default)]
pub struct Side {
    /// Seconds that the client waited.
    pub seconds: Series,
    /// Seconds of processor time that the server used meanwhile.
    pub cpu: Series,
    /// Most memory that the server ever had, in bytes.
    pub peak: u64,
}

impl Series {
    /// The middle value, or the mean of the middle two; 0 for none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        }
    }

    /// The smallest and the largest value.
    pub fn range(&self) -> (f64, f64) {
        let least = self.0.iter().copied().min_by(f64::total_cmp);
        let most = self.0.iter().copied().max_by(f64::total_cmp);
        (least.unwrap_or_default(), most.unwrap_or_default())
    }
}

impl Row {
    /// How many times as fast we are: the median of the rounds' ratios, since what disturbs a round slows both sides.
    pub fn ratio(&self) -> f64 {
        let rounds = self.theirs.seconds.0.iter().zip(&self.ours.seconds.0);
        Series(rounds.map(|(theirs, ours)| theirs / ours).collect()).median()
    }
}

/// The lines as a table, with a heading.
pub fn table(theirs: &str, rows: &[Row]) -> String {
    let mut text = format!(
        "{:<26} {theirs:>28} {:>28} {:>7} {:>7} {:>14} {:>13}\n",
        "seconds: median (range)", "Drover", "ratio", "reach", "CPU seconds", "peak MiB"
    );
    for row in rows {
        let reach = row.reach.map_or_else(String::new, |reach| format!("{reach}x"));
        let mebibytes = |side: &Side| side.peak >> 20;
        text.push_str(&format!(
            "{:<26} {:>28} {:>28} {:>6.2}x {reach:>7} {:>14} {:>13}\n",
            row.name,
            seconds(&row.theirs.seconds),
            seconds(&row.ours.seconds),
            row.ratio(),
            format!("{:.2} / {:.2}", row.theirs.cpu.median(), row.ours.cpu.median()),
            format!("{} / {}", mebibytes(&row.theirs), mebibytes(&row.ours)),
        ));
    }
    text
}

fn seconds(series: &Series) -> String {
    let (least, most) = series.range();
    format!("{:.3} ({least:.3} to {most:.3})", series.median())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ranges() {
        let series = |values: &[f64]| Series(values.to_vec());
        assert_eq!(series(&[3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(series(&[4.0, 1.0, 3.0, 2.0]).median(), 2.5);
        assert_eq!(series(&[3.0, 1.0, 2.0]).range(), (1.0, 3.0));
        assert_eq!((series(&[]).median(), series(&[]).range()), (0.0, (0.0, 0.0)));
    }

    #[test]
    fn a_ratio_is_that_of_the_rounds() {
        let side = |seconds: &[f64]| Side { seconds: Series(seconds.to_vec()), ..Side::default() };
        // The second round was disturbed: for both.
        let row = Row {
            name: "work".into(),
            theirs: side(&[2.0, 30.0, 2.2]),
            ours: side(&[1.0, 10.0, 1.0]),
            reach: Some(2.0),
        };
        assert!((row.ratio() - 2.2).abs() < 1e-9);
        let text = table("Nix", &[row]);
        assert!(text.contains("2.200 (2.000 to 30.000)") && text.contains("2.20x      2x"), "{text}");
    }
}
