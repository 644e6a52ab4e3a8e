use std::{fs, path::Path};

use anyhow::ensure;
use serde::Serialize;

/// What one fault did.
#[derive(Debug, Default, Serialize)]
pub(super) struct Row {
    pub(super) fault: String,
    /// From the end of the fault until everything was as before.
    pub(super) seconds: f64,
    pub(super) calls: u64,
    pub(super) failed: u64,
    /// Streams of calls that broke off with their instance, and were asked for again.
    pub(super) resumed: u64,
    /// How long Disco took an instance that had died for alive; of several, the longest.
    pub(super) known: Option<f64>,
    /// How long the proxy still called an instance that had died; of several, the longest.
    pub(super) left: Option<f64>,
    /// Updates that the proxy was sent and took.
    pub(super) responses: u64,
    /// Registrations that had been accepted and were not there afterwards.
    pub(super) lost: usize,
    /// Living instances that were removed, be it for a while.
    pub(super) removed: usize,
    /// Why, as the history has it.
    pub(super) evidence: Vec<String>,
    pub(super) note: String,
    /// Why it could not be measured.
    pub(super) problem: Option<String>,
    /// It was not asked for.
    #[serde(skip)]
    pub(super) skipped: bool,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    rows: Vec<Row>,
}

impl Table {
    pub(super) const HEAD: &'static str = "| fault | calls, failed | death known to Disco, traffic gone after | sent to the proxy | accepted state lost | living removed | all as before after |\n\
                                           |---|---|---|---|---|---|---|";

    pub(super) fn add(&mut self, row: Row) {
        if row.skipped {
            return;
        }
        eprintln!("{}", row.line());
        if let Some(problem) = &row.problem {
            eprintln!("    {problem}");
        }
        row.evidence.iter().for_each(|line| eprintln!("    {line}"));
        self.rows.push(row);
    }

    /// Into the target folder, as Markdown and as JSON.
    pub(super) fn write(&self, registered: usize) -> anyhow::Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let lines: Vec<_> = self.rows.iter().map(Row::line).collect();
        let text = format!("{}\n{}\n\nBeside it {registered} registrations.\n", Self::HEAD, lines.join("\n"));
        fs::write(folder.join("chaos.md"), text)?;
        let document = serde_json::json!({"registered": registered, "faults": self.rows});
        fs::write(folder.join("chaos.json"), serde_json::to_string_pretty(&document)?)?;
        eprintln!("Written: target/chaos.md, target/chaos.json");
        Ok(())
    }

    /// Fails when something happened that must not.
    pub(super) fn judge(&self, registered: usize) -> anyhow::Result<()> {
        let bad = |row: &&Row| row.failed > 0 || row.lost > 0 || row.removed > 0 || row.problem.is_some();
        let bad: Vec<_> = self.rows.iter().filter(bad).map(|row| format!("{row:?}")).collect();
        ensure!(bad.is_empty(), "not as it must be:\n{}", bad.join("\n"));
        ensure!(registered >= 10_000, "only {registered} registrations were accepted beside it");
        Ok(())
    }
}

impl Row {
    fn line(&self) -> String {
        let Self { fault, seconds, calls, failed, known, left, responses, lost, removed, note, .. } = self;
        let left =
            known.zip(*left).map_or(String::new(), |(known, left)| format!("{known:.2} s, {left:.2} s"));
        let note = if note.is_empty() { String::new() } else { format!("; {note}") };
        format!(
            "| {fault}{note} | {calls}, {failed} | {left} | {responses} | {lost} | {removed} | {seconds:.2} s |"
        )
    }
}
