use comfy_table::{ContentArrangement, Table, presets};

/// Narrowest a column gets.
const NARROWEST: usize = 6;
/// Most lines that a sentence takes.
const LINES: usize = 4;
/// Space between columns.
const GAP: usize = 2;

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct Column {
    title: &'static str,
    wide_only: bool,
    whole: bool,
    sentence: bool,
}

impl Column {
    /// A column of every table.
    pub(in crate::cli) const fn new(title: &'static str) -> Self {
        Self { title, wide_only: false, whole: false, sentence: false }
    }

    /// A column of every table that says nothing when it is cut, such as an address: names are shortened before it.
    pub(in crate::cli) const fn whole(title: &'static str) -> Self {
        Self { title, wide_only: false, whole: true, sentence: false }
    }

    /// A column of every table that takes several lines where it does not fit, up to [`LINES`].
    pub(in crate::cli) const fn sentence(title: &'static str) -> Self {
        Self { title, wide_only: false, whole: false, sentence: true }
    }

    /// A column that is left out when the table has to fit a width.
    pub(in crate::cli) const fn wide(title: &'static str) -> Self {
        Self { title, wide_only: true, whole: false, sentence: false }
    }
}

/// Draws a table. With a width it fits: columns of the wide form are left out and the widest columns are shortened.
pub(in crate::cli) fn render(columns: &[Column], rows: &[Vec<String>], width: Option<usize>) -> String {
    let kept = |index: usize| columns.get(index).is_some_and(|column| width.is_none() || !column.wide_only);
    let keep = |row: Vec<String>| -> Vec<String> {
        row.into_iter().enumerate().filter(|(index, _)| kept(*index)).map(|(_, cell)| cell).collect()
    };
    let mut lines = vec![keep(columns.iter().map(|column| column.title.to_owned()).collect())];
    lines.extend(rows.iter().cloned().map(keep));
    if let Some(width) = width {
        let shown: Vec<&Column> = columns.iter().filter(|column| !column.wide_only).collect();
        let widths = fit(&lines, &shown, width);
        for line in &mut lines {
            for ((cell, width), column) in line.iter_mut().zip(&widths).zip(&shown) {
                if column.sentence {
                    *cell = wrap(cell, *width);
                } else {
                    shorten(cell, *width);
                }
            }
        }
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.add_rows(lines);
    let padding = u16::try_from(GAP).unwrap_or_default();
    for column in table.column_iter_mut() {
        column.set_padding((0, padding));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// The widths at which the lines fit: taken from the widest column, one character at a time, and from those that are to stay
/// `whole` only when the others have nothing left to give.
fn fit(lines: &[Vec<String>], columns: &[&Column], width: usize) -> Vec<usize> {
    let count = lines.first().map_or(0, Vec::len);
    let mut widths: Vec<usize> = (0..count)
        .map(|index| lines.iter().filter_map(|line| line.get(index)).map(|cell| cell.chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    let room = width.saturating_sub(GAP * count.saturating_sub(1));
    let mut over = widths.iter().sum::<usize>().saturating_sub(room);
    for stays in [false, true] {
        while over > 0 {
            let some = widths.iter_mut().zip(columns).filter(|(_, column)| column.whole == stays);
            let widest = some.map(|(width, _)| width).max_by_key(|width| **width);
            let Some(widest) = widest.filter(|width| **width > NARROWEST) else { break };
            *widest -= 1;
            over -= 1;
        }
    }
    widths
}

/// Breaks a sentence into lines between words, and what is longer than a line anywhere.
fn wrap(sentence: &str, width: usize) -> String {
    let width = width.max(1);
    let mut sentence = sentence.to_owned();
    shorten(&mut sentence, width * LINES - width / 2);
    let (mut lines, mut line) = (Vec::new(), String::new());
    for word in sentence.split(' ') {
        let (room, length) = (width.saturating_sub(line.chars().count()), word.chars().count());
        if !line.is_empty() && length < room {
            line.push(' ');
            line.push_str(word);
            continue;
        }
        if !line.is_empty() {
            lines.push(std::mem::take(&mut line));
        }
        for c in word.chars() {
            if line.chars().count() == width {
                lines.push(std::mem::take(&mut line));
            }
            line.push(c);
        }
    }
    lines.push(line);
    lines.join("\n")
}

/// Cuts the middle out: names often differ at their ends.
fn shorten(cell: &mut String, width: usize) {
    let count = cell.chars().count();
    if count <= width || width == 0 {
        return;
    }
    let tail = (width - 1) / 2;
    let head = width - 1 - tail;
    let shown = cell.chars().take(head).chain(['…']).chain(cell.chars().skip(count - tail)).collect();
    *cell = shown;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns() -> [Column; 4] {
        [Column::new("NAME"), Column::new("STATE"), Column::wide("NOTE"), Column::new("AGE")]
    }

    fn row(cells: [&str; 4]) -> Vec<String> {
        cells.map(str::to_owned).to_vec()
    }

    #[test]
    fn columns_line_up_without_borders() {
        let rows = [row(["greeter", "serving", "x", "3s"]), row(["a", "draining", "y", "12m"])];
        assert_eq!(
            render(&columns(), &rows, Some(80)),
            "NAME     STATE     AGE\n\
             greeter  serving   3s\n\
             a        draining  12m\n"
        );
        assert_eq!(
            render(&columns(), &rows, None),
            "NAME     STATE     NOTE  AGE\n\
             greeter  serving   x     3s\n\
             a        draining  y     12m\n"
        );
    }

    #[test]
    fn a_table_fits_and_the_wide_form_shortens_nothing() {
        let long = format!("start-{}-end", "n".repeat(200));
        let rows = [row([&long, "serving", &long, "3s"]), row(["b", &"s".repeat(90), "", "3s"])];
        let table = render(&columns(), &rows, Some(80));
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
        assert!(table.contains("start-n") && table.contains('…') && table.contains("-end "), "{table}");
        assert!(render(&columns(), &rows, None).contains(&long));
    }

    #[test]
    fn names_give_way_to_what_says_nothing_when_it_is_cut() {
        let columns = ["SERVICE", "ID"].map(Column::new).into_iter().chain([Column::whole("ADDRESS")]);
        let columns: Vec<_> = columns.collect();
        let cells = ["payments-api.production", "ip-10-0-13-37", "10.0.13.37:50051"].map(str::to_owned);
        let table = render(&columns, &[cells.to_vec()], Some(34));
        assert_eq!(table.lines().nth(1), Some("pay…ion  ip-…-37  10.0.13.37:50051"), "{table}");
        let table = render(&columns, &[cells.to_vec()], Some(24));
        assert!(table.lines().all(|line| line.chars().count() <= 24), "{table}");
    }

    #[test]
    fn sentences_take_several_lines() {
        let columns = [Column::new("NODE"), Column::sentence("WHY")];
        let row = |why: &str| vec!["edge".to_owned(), why.to_owned()];
        let rows = [row("it has not passed its check yet"), row("a-word-longer-than-a-line"), row("-")];
        assert_eq!(
            render(&columns, &rows, Some(20)),
            "NODE  WHY\n\
             edge  it has not\n      passed its\n      check yet\n\
             edge  a-word-longer-\n      than-a-line\n\
             edge  -\n"
        );
        let long = render(&columns, &[row(&"word ".repeat(90))], Some(40));
        assert!((3..=6).contains(&long.lines().count()) && long.contains('…'), "{long}");
        assert!(long.lines().all(|line| line.chars().count() <= 40), "{long}");
        assert_eq!(render(&columns, &rows, None).lines().count(), 4);
    }

    #[test]
    fn nothing_breaks_in_a_very_narrow_terminal() {
        let rows = [row(["a-long-long-name", "serving", "", "3s"])];
        assert!(render(&columns(), &rows, Some(1)).lines().count() == 2);
    }
}
