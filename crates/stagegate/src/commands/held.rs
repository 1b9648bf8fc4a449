//! What a run that waits for a person says to the one at the terminal: owns the question, and the commands that are
//! printed where nobody can be asked. They work as they are pasted: with the data directory and the tenant of the run.

use std::{fmt::Write as _, path::Path};

use stagegate_core::{Error, RunId, StageId, TenantId, store::StageDetail};
use stagegate_engine::{Action, Engine};

use super::run::Signals;
use crate::{
    board::shortened,
    cli::Global,
    config::Config,
    output::{self, BAD, DIM, GOOD, STRONG, WARN, paint},
};

/// Lines of a held output that are shown before a person is asked.
const OUTPUT_LINES: usize = 24;
/// The longest reason that a person can give: what the API takes.
const REASON_MAX_CHARS: usize = 2_000;
/// Who decided, where no key tells it.
const DECIDED_BY: &str = "terminal";

/// Where a run lies, for commands that are to find it again.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    program: String,
    flags: String,
    tenant: TenantId,
    port: u16,
}

/// A run that waits, and where it lies.
pub(crate) struct Held<'a> {
    pub engine: &'a Engine,
    pub tenant: &'a TenantId,
    pub run: RunId,
    pub stages: &'a [StageId],
    pub place: &'a Place,
}

/// What a person said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decided {
    /// Every held stage is approved or rejected: the run goes on.
    Now,
    /// At least one is left as it is.
    Later,
}

impl Place {
    /// The place of this process.
    pub(crate) fn new(global: &Global, config: &Config, tenant: &TenantId) -> Self {
        let mut flags = String::new();
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        if let Some(path) = &global.config {
            let _ = write!(flags, " --config {}", quoted(&absolute(path).display().to_string()));
        }
        if let Some(path) = &global.data_dir {
            let _ = write!(flags, " --data-dir {}", quoted(&absolute(path).display().to_string()));
        }
        // As this one was started: from a checkout the binary is on no path.
        let program = std::env::args().next().unwrap_or_else(|| "stagegate".to_owned());
        if config.store.database_url.is_some() || global.embedded {
            flags.insert_str(0, " --embedded");
        }
        Self { program: quoted(&program), flags, tenant: tenant.clone(), port: config.http.listen.port() }
    }

    /// The commands to decide with.
    fn hints(&self, run: RunId, stage: &StageId) -> Vec<String> {
        let Self { program, flags, tenant, port } = self;
        let mut lines = Vec::new();
        if *tenant == TenantId::default() {
            lines.push(format!("{program} serve{flags}"));
        } else {
            // An open daemon is the default tenant's alone.
            lines.push(format!(
                "export STAGEGATE_API_KEY=$({program} keys create --tenant {tenant} --role operator --name terminal \
                 --expires 1d{flags})"
            ));
            lines.push(format!("{program} serve --auth keys{flags}"));
        }
        let server = format!(" --server http://127.0.0.1:{port}");
        lines.push(format!("{program} runs approve {run} {stage}{server}"));
        lines.push(format!("{program} runs reject {run} {stage} --reason 'why not'{server}"));
        lines
    }
}

impl Held<'_> {
    /// Shows what waits and asks; where nobody can be asked, tells how to decide.
    pub(crate) async fn decide(&self, signals: &mut Signals) -> Result<Decided, Error> {
        let names = self.stages.iter().map(StageId::as_str).collect::<Vec<_>>().join(", ");
        output::note_wrapped(&format!("{}: {names} waits for a person", paint(WARN.bold(), "held")));
        for stage in self.stages {
            let detail = self.engine.store().stage(self.tenant, self.run, stage).await?;
            show(stage, detail.as_ref());
            let attempt = detail.as_ref().and_then(|detail| detail.attempts.last()).map(|attempt| attempt.number);
            if !output::can_ask() || !self.ask(stage, attempt, signals).await? {
                self.tell();
                return Ok(Decided::Later);
            }
        }
        Ok(Decided::Now)
    }

    /// Whether the person decided.
    async fn ask(&self, stage: &StageId, attempt: Option<u32>, signals: &mut Signals) -> Result<bool, Error> {
        loop {
            let Some(answer) = answer("approve, reject or later? [a/r/l] ", signals).await else { return Ok(false) };
            let action = match answer.to_lowercase().as_str() {
                "a" | "approve" | "y" | "yes" => Action::Approve(stage.clone()),
                "r" | "reject" | "n" | "no" => {
                    let Some(reason) = answer_reason(signals).await else { return Ok(false) };
                    Action::Reject(stage.clone(), reason)
                }
                "l" | "later" | "" => return Ok(false),
                _ => continue,
            };
            let by = Some(DECIDED_BY.to_owned());
            self.engine.act_on(self.tenant, self.run, action, attempt, by).await?;
            return Ok(true);
        }
    }

    /// How to decide later.
    fn tell(&self) {
        output::note("\ndecide with a daemon on the same data, which then goes on with the run:");
        if let Some(stage) = self.stages.first() {
            for line in self.place.hints(self.run, stage) {
                output::note(&format!("  {line}"));
            }
        }
    }
}

/// What was measured of a held output, and how it begins.
fn show(stage: &StageId, detail: Option<&StageDetail>) {
    let Some(attempt) = detail.and_then(|detail| detail.attempts.last()) else { return };
    output::note(&format!(
        "\n{} {}",
        paint(STRONG, stage.as_str()),
        paint(DIM, &format!("attempt {}", attempt.number))
    ));
    for assessment in &attempt.assessments {
        let mark = if assessment.passed { paint(GOOD, "✓") } else { paint(BAD, "✗") };
        let reason = shortened(&assessment.reason, REASON_MAX_CHARS);
        output::note_wrapped(&format!("  {mark} {}: {reason}", assessment.name));
    }
    let Some(output) = &attempt.output else { return };
    for line in excerpt(&output.parse(), output::stderr_width()) {
        output::note(&format!("  {} {line}", paint(DIM, "│")));
    }
}

/// A line from the person; None where they leave, or close their side.
async fn answer(question: &str, signals: &mut Signals) -> Option<String> {
    use std::io::Write as _;
    let mut stderr = anstream::stderr();
    let _ = write!(stderr, "{}", paint(STRONG, question));
    let _ = stderr.flush();
    let reading = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line);
        read.ok().filter(|read| *read > 0).map(|_| line.trim().to_owned())
    });
    tokio::select! {
        biased;
        _ = signals.next() => {
            output::note("");
            None
        }
        line = reading => line.ok().flatten(),
    }
}

async fn answer_reason(signals: &mut Signals) -> Option<String> {
    loop {
        let reason = answer("why? ", signals).await?;
        if !reason.is_empty() {
            return Some(reason.chars().take(REASON_MAX_CHARS).collect());
        }
    }
}

/// The first lines of an output.
fn excerpt(output: &serde_json::Value, width: Option<usize>) -> Vec<String> {
    let text = output.as_str().map_or_else(|| format!("{output:#}"), str::to_owned);
    let text = stagegate_telemetry::text::visible(&text).into_owned();
    let lines = crate::layout::wrap(&text, width.map(|width| width.saturating_sub(4)));
    let hidden = lines.len().saturating_sub(OUTPUT_LINES);
    let mut shown: Vec<String> = lines.into_iter().take(OUTPUT_LINES).collect();
    if hidden > 0 {
        shown.push(format!("… {hidden} more lines"));
    }
    shown
}

/// A word as a POSIX shell takes it.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(flags: &str, tenant: &str) -> Place {
        let tenant = TenantId::new(tenant).expect("a tenant");
        Place { program: "stagegate".to_owned(), flags: flags.to_owned(), tenant, port: 8080 }
    }

    fn hints(place: &Place) -> String {
        let stage = StageId::new("review").expect("valid");
        place.hints(RunId(uuid::Uuid::nil()), &stage).join("\n")
    }

    #[test]
    fn words_are_quoted_as_a_shell_takes_them() {
        assert_eq!(quoted("/tmp/plain-1.2"), "/tmp/plain-1.2");
        assert_eq!(quoted("/tmp/my data"), "'/tmp/my data'");
        assert_eq!(quoted("it's $HOME"), "'it'\\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_commands_name_the_data_directory_the_tenant_and_the_database_that_is_not_meant() {
        insta::assert_snapshot!("hints_default", hints(&place(" --data-dir '/tmp/my data'", "default")));
        insta::assert_snapshot!("hints_tenant", hints(&place(" --embedded --data-dir /tmp/x", "acme")));
    }

    #[test]
    fn a_long_output_is_cut_and_says_so() {
        let lines = excerpt(&serde_json::Value::String("word\n".repeat(100)), Some(80));
        assert_eq!((lines.len(), lines.last().map(String::as_str)), (OUTPUT_LINES + 1, Some("… 76 more lines")));
    }
}
