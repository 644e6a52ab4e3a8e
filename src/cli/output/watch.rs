use std::time::Duration;

use serde_json::Value;

use super::{Format, ListOptions, View, note, print};
use crate::{cli::failure::Failure, client::Http, model::format_duration, rt::Backoff};

/// How often a list without a long poll is asked for again.
const POLL: Duration = Duration::from_secs(1);

/// How long a server may hold an answer.
const HELD: Duration = Duration::from_secs(30);

/// How a list is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Refresh {
    /// The server answers at once.
    Now,
    /// The server may hold the answer until there is something after this revision.
    After(u64),
}

impl Refresh {
    /// Gets what is at `path`, which answers to `index` and `wait`.
    pub(in crate::cli) async fn get(self, http: &Http, path: &str) -> Result<Value, Failure> {
        Ok(match self {
            Self::Now => http.get(path, Duration::ZERO).await?,
            Self::After(revision) => {
                http.get(&format!("{path}?index={revision}&wait={}", format_duration(HELD)), HELD).await?
            }
        })
    }
}

/// Prints a list, and with `--watch` again whenever it changes.
pub(in crate::cli) async fn list(
    options: &ListOptions,
    fetch: impl AsyncFn(Refresh) -> Result<View, Failure>,
) -> Result<(), Failure> {
    let mut view = fetch(Refresh::Now).await?;
    view.print(options.output)?;
    if !options.watch {
        return Ok(());
    }
    let mut backoff = Backoff::new(POLL, Duration::from_secs(10));
    let mut lost = false;
    loop {
        let asked = tokio::time::Instant::now();
        let after =
            view.document.get("revision").and_then(Value::as_u64).map_or(Refresh::Now, Refresh::After);
        match fetch(after).await {
            Ok(next) => {
                backoff.reset();
                if next.content() != view.content() {
                    if matches!(options.output, Format::Table | Format::Wide) {
                        print("\n")?;
                    }
                    next.print(options.output)?;
                }
                if std::mem::take(&mut lost) {
                    note("the server is back");
                }
                view = next;
                tokio::time::sleep_until(asked + POLL).await;
            }
            Err(failure) => {
                if !std::mem::replace(&mut lost, true) {
                    note(&format!("{failure}\nstill trying; what was printed last may be out of date"));
                }
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use serde_json::json;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_asks_for_what_is_newer_and_outlives_the_server() {
        let asked = RefCell::new(Vec::new());
        let fetch = async |refresh| {
            asked.borrow_mut().push(refresh);
            let count = asked.borrow().len();
            if (3..6).contains(&count) {
                return Err(Failure::failed("gone"));
            }
            let document = json!({"revision": count, "things": []});
            Ok(View { document, items: Some("things"), table: |_, _| String::new(), empty: "" })
        };
        let options = ListOptions { output: Format::Json, watch: true };
        assert!(tokio::time::timeout(Duration::from_secs(60), list(&options, fetch)).await.is_err());
        let asked = asked.into_inner();
        // The third to the fifth fail, so the sixth still asks for what is newer than the second.
        let want = [0, 1, 2, 2, 2, 2, 6, 7].map(|revision| match revision {
            0 => Refresh::Now,
            revision => Refresh::After(revision),
        });
        assert_eq!(asked.get(..8), Some(want.as_slice()));
    }

    #[tokio::test]
    async fn a_first_answer_that_fails_ends_it() {
        let options = ListOptions { output: Format::Table, watch: true };
        let failure = list(&options, async |_| Err(Failure::failed("gone"))).await.unwrap_err();
        assert_eq!(failure, Failure::failed("gone"));
    }
}
