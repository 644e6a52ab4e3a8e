use minijinja::{Environment, UndefinedBehavior, syntax::SyntaxConfig, value::Serde};

use super::RenderError;

/// Steps that a template may take: plenty for the largest set, and over within milliseconds.
const FUEL: u64 = 1_000_000;

/// Longest text that a template may make, in bytes.
const LONGEST: usize = 1 << 20;

/// Fills a template (Jinja) with the document of the format `json`. What does not exist in it is an error, not an empty text.
///
/// # Errors
/// [`RenderError::Template`] says where and what; an empty text is an error, too.
pub fn render_template(template: &str, view: &serde_json::Value) -> Result<String, RenderError> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    // It is no HTML, whatever the file is called.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    let wrong = |error: &dyn std::fmt::Display| RenderError::Template(format!("the template: {error}"));
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .keep_trailing_newline(true)
        .build()
        .map_err(|error| wrong(&error))?;
    environment.set_syntax(syntax);
    let text =
        environment.render_named_str("template", template, Serde(view)).map_err(|error| wrong(&error))?;
    if text.trim().is_empty() {
        return Err(wrong(&"it makes an empty text, which many databases take for \"found one alone\""));
    }
    if text.len() > LONGEST {
        return Err(wrong(&format_args!("it makes more than {LONGEST} bytes")));
    }
    Ok(text)
}
