//! What was measured, as tables for people and as JSON for programs.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::Contender;

/// A number that says something about a server.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    name: &'static str,
    unit: &'static str,
    value: f64,
    /// How many times the limit's it may be.
    aim: Option<f64>,
}

impl Figure {
    pub(crate) fn new(name: &'static str, unit: &'static str, value: f64) -> Self {
        Self { name, unit, value, aim: None }
    }

    pub(crate) fn aim(self, times_the_limit: f64) -> Self {
        Self { aim: Some(times_the_limit), ..self }
    }
}

/// What a contender gave in a case, or why it gave nothing.
#[derive(Debug)]
struct Row {
    part: &'static str,
    case: String,
    contender: Contender,
    outcome: Result<Vec<Figure>, String>,
}

#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    /// Cases that the limit or Disco did not get through.
    pub(crate) failed: bool,
}

impl Report {
    pub(crate) fn add(
        &mut self,
        part: &'static str,
        case: &str,
        contender: Contender,
        figures: impl IntoIterator<Item = Figure>,
    ) {
        let outcome = Ok(figures.into_iter().collect());
        self.rows.push(Row { part, case: case.to_owned(), contender, outcome });
    }

    /// There are no figures, and this is why.
    pub(crate) fn missing(&mut self, part: &'static str, case: &str, contender: Contender, reason: &str) {
        println!("  {}, {case}: {reason}", contender.name());
        self.rows.push(Row { part, case: case.to_owned(), contender, outcome: Err(reason.to_owned()) });
    }

    pub(crate) fn is_missing(&self, part: &str, case: &str, contender: Contender) -> bool {
        self.of(part, case).any(|row| row.contender == contender && row.outcome.is_err())
    }

    fn of<'a>(&'a self, part: &'a str, case: &'a str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.part == part && row.case == case)
    }

    /// What the limit gave for a figure of a case.
    fn limit(&self, part: &str, case: &str, figure: &str) -> Option<f64> {
        let row = self.of(part, case).find(|row| row.contender == Contender::Limit)?;
        Some(row.outcome.as_ref().ok()?.iter().find(|other| other.name == figure)?.value)
    }

    /// A table of the case: a row for each contender, what has an aim also as a multiple of the limit's.
    pub(crate) fn print(&self, part: &str, case: &str) {
        let mut rows =
            self.of(part, case).filter_map(|row| Some((row.contender, row.outcome.as_ref().ok()?)));
        let Some(first) = rows.next() else { return };
        let heads = first
            .1
            .iter()
            .map(|figure| format!("  {:>20}", format!("{} {}", figure.name, figure.unit).trim_end()));
        println!("  {:<34}{}", case, heads.collect::<String>());
        for (contender, figures) in std::iter::once(first).chain(rows) {
            let cells =
                figures.iter().map(|figure| format!("  {:>20}", self.cell(part, case, contender, figure)));
            println!("    {:<32}{}", contender.name(), cells.collect::<String>());
        }
    }

    /// The value, and how many times the limit's it is.
    fn cell(&self, part: &str, case: &str, contender: Contender, figure: &Figure) -> String {
        let value = text(figure.value);
        match self.limit(part, case, figure.name) {
            Some(limit) if figure.aim.is_some() && contender != Contender::Limit && limit > 0.0 => {
                format!("{value} ({:.2} x)", figure.value / limit)
            }
            _ => value,
        }
    }

    /// All figures that have an aim or are compared with peers, one column for each contender.
    pub(crate) fn markdown(&self) -> String {
        let mut lines = vec![
            format!("| | {} |", Contender::ALL.map(Contender::name).join(" | ")),
            "|---|---|---|---|---|".to_owned(),
        ];
        let mut seen: Vec<(&str, &str, &str)> = vec![];
        for row in &self.rows {
            for figure in row.outcome.iter().flatten() {
                let of = (row.part, row.case.as_str(), figure.name);
                if seen.contains(&of) {
                    continue;
                }
                seen.push(of);
                let cells = Contender::ALL.map(|contender| {
                    let found = self.of(row.part, &row.case).find(|other| other.contender == contender);
                    match found.map(|other| &other.outcome) {
                        Some(Ok(figures)) => figures
                            .iter()
                            .find(|other| other.name == figure.name)
                            .map_or_else(String::new, |other| {
                                self.cell(row.part, &row.case, contender, other)
                            }),
                        Some(Err(reason)) => reason.split(':').next().unwrap_or_default().to_owned(),
                        None => String::new(),
                    }
                });
                let unit = if figure.unit.is_empty() { String::new() } else { format!(", {}", figure.unit) };
                lines.push(format!(
                    "| {}, {}: {}{unit} | {} |",
                    row.part,
                    row.case,
                    figure.name,
                    cells.join(" | ")
                ));
            }
        }
        lines.join("\n")
    }

    /// Writes everything to a file.
    pub(crate) fn write(&self, path: &Path, machine: &Value) {
        let rows = self.rows.iter().map(|row| {
            let mut value = json!({"part": row.part, "case": row.case, "server": row.contender.name()});
            match &row.outcome {
                Ok(figures) => {
                    let figures = figures.iter().map(|figure| {
                        json!({
                            "name": figure.name, "unit": figure.unit, "value": rounded(figure.value),
                            "aim": figure.aim, "limit": self.limit(row.part, &row.case, figure.name).map(rounded),
                        })
                    });
                    value["figures"] = figures.collect();
                }
                Err(reason) => value["missing"] = json!(reason),
            }
            value
        });
        let all = json!({"machine": machine, "rows": rows.collect::<Vec<_>>()});
        let text = serde_json::to_string_pretty(&all).expect("it is JSON");
        fs::write(path, text + "\n").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn text(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == v.trunc() => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
