//! The core as its users see it.

mod definitions;
mod examples;
mod outputs;

use stagegate_core::{Code, Error, ModelRef, Pipeline, Violation, pipeline::Models};

/// Serves `sim` and `openai`; knows no price of `sim/unpriced`; `anthropic` lacks its key.
pub(crate) struct Served;

impl Models for Served {
    fn check(&self, model: &ModelRef) -> Result<(), Error> {
        match model.provider() {
            "sim" | "openai" => Ok(()),
            "anthropic" => Err(Error::new(Code::ProviderWithoutKey, "anthropic has no key: set ANTHROPIC_API_KEY")),
            other => Err(Error::new(Code::UnknownModel, format!("there is no provider `{other}`"))),
        }
    }

    fn is_priced(&self, model: &ModelRef) -> bool {
        model.model() != "unpriced"
    }
}

pub(crate) fn parse(text: &str) -> Result<Pipeline, Vec<Violation>> {
    Pipeline::parse(text, &Served)
}

#[track_caller]
pub(crate) fn valid(text: &str) -> Pipeline {
    parse(text).unwrap_or_else(|mistakes| {
        let told: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
        panic!("{}\n{text}", told.join("\n"))
    })
}

#[track_caller]
pub(crate) fn mistakes(text: &str) -> Vec<Violation> {
    parse(text).map(|pipeline| pipeline.name).expect_err(text)
}
