//! `anabranch generate`: text from a checkpoint, as it comes.

use crate::{
    device::{Place, Task, Where},
    failure::Failure,
    interrupt,
    memory::{self, Demand},
    output,
    prompts::Prompts,
    source::Source,
    units,
};
use anabranch::Sampling;
use anabranch_model::{
    BLOCK_SIZE, Error, GenerateOptions, Generated, Message, Model, Session, Stats, Tokenizer, generate,
};
use std::time::{Duration, Instant};

/// Generate text from a checkpoint
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch generate --model DIR --prompt 'The river' --max-new-tokens 64\n  \
    anabranch generate --model DIR --chat --temperature 0.7 --top-p 0.95 --seed 1 < question.txt\n  \
    anabranch generate --model DIR --prompt 'One' --prompt 'Two' --stats\n  \
    anabranch generate --model DIR --prompt-file questions.txt --batch-size 256\n  \
    anabranch generate --random-weights deepseek-moe-16b --device cuda --prompt 'One' --stats\n\n\
    Without sampling options the likeliest token is taken every time. The same options and seed give the same text.\n\
    Several prompts are run together, and printed one after another.\n\
    Text ends at an end-of-text token, at a --stop string (which is not printed) or after --max-new-tokens.\n\
    A closed pipe (`anabranch generate ... | head -c 100`) ends the run quietly, with success.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    prompts: Prompts,
    /// Put the prompt in the checkpoint's chat template, as the user's message
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    place: Where,
    /// Most tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = super::at_least_one)]
    max_new_tokens: usize,
    /// Sample, with logits divided by this; 0 takes the likeliest token [default: 1 with --top-k, --top-p or --min-p,
    /// else 0]
    #[arg(long, value_name = "T", value_parser = temperature)]
    temperature: Option<f32>,
    /// Sample from the K likeliest tokens only
    #[arg(long, value_name = "K", value_parser = super::at_least_one)]
    top_k: Option<usize>,
    /// Sample from the fewest tokens that have this probability together
    #[arg(long, value_name = "P", value_parser = fraction)]
    top_p: Option<f32>,
    /// Sample from tokens at least this probable, relative to the likeliest
    #[arg(long, value_name = "P", value_parser = share)]
    min_p: Option<f32>,
    /// Make tokens that occurred less likely: 1 changes nothing, 1.1 is usual
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = penalty)]
    repetition_penalty: f32,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Most prompts that run side by side; the others wait
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = super::at_least_one)]
    batch_size: usize,
    /// Tokens that the cache holds, of all prompts that run and their output; where they need more, the last ones wait
    /// [default: what --batch-size of them may need]
    #[arg(long, value_name = "N", value_parser = super::at_least_one)]
    cache_tokens: Option<usize>,
    /// Say on stderr how fast it went and how much memory it took
    #[arg(long)]
    stats: bool,
    /// Refuse to start if more than this is needed, as 8G or 512M [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    memory_limit: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.place.run(arguments)
}

impl Task for &Arguments {
    fn on<P: Place>(self, place: P) -> Result<(), Failure> {
        let sampling = self.sampling()?;
        let texts = self.prompts.lines()?;
        let config = self.source.config()?;
        let tokenizer = self.source.tokenizer(&config)?;
        let encode = |text: &String| {
            if self.chat { tokenizer.encode_chat(&[Message::user(text)]) } else { tokenizer.encode(text) }
        };
        let prompts = texts.iter().map(encode).collect::<Result<Vec<_>, Error>>()?;
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens,
            sampling,
            seed: self.seed,
            stop: self.stop.clone(),
            eos: config.eos_token_ids.clone(),
            batch_size: self.batch_size,
            cache_tokens: self.cache_tokens,
        };
        let blocks = options.cache_blocks(&prompts, config.max_position_embeddings);
        let cached_tokens = blocks.saturating_mul(BLOCK_SIZE);
        let demand = Demand { cached_tokens, logit_rows: prompts.len().min(self.batch_size) };
        memory::check::<P>(&self.source, &config, &demand, self.memory_limit)?;
        let begun = Instant::now();
        let model = self.source.load(&config, place)?;
        let loading = begun.elapsed();
        let generated = interrupt::deferred(|| speak(&model, &tokenizer, &prompts, &options))?;
        if self.stats {
            let loading = (P::bytes_read(&self.source)?, loading);
            output::complain(&report(loading, &generated.stats, &model.backend().memory()?));
        }
        Ok(())
    }
}

/// Generates, and prints: the text of a single prompt as it comes, those of several one after another under a heading.
fn speak<P: Place>(
    model: &Model<P>,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
) -> Result<Generated, Failure> {
    let several = prompts.len() > 1;
    let mut refused = None;
    let mut printed = false;
    let mut on_text = |_: usize, text: &str| {
        if several {
            return Ok(());
        }
        printed = true;
        output::print(text).map_err(|failure| {
            refused = Some(failure);
            Error::Interrupted
        })
    };
    let mut session = Session::new(model)?;
    let result = generate(&mut session, tokenizer, prompts, options, &interrupt::requested, &mut on_text);
    if let Some(failure) = refused {
        return Err(failure);
    }
    if several {
        let generated = result?;
        for (index, sequence) in generated.sequences.iter().enumerate() {
            output::print(&format!("==> prompt {} of {} <==\n{}\n", index + 1, prompts.len(), sequence.text))?;
        }
        return Ok(generated);
    }
    // The line ends whatever happened, so that an error message begins a new one.
    if printed || result.is_ok() {
        output::print("\n")?;
    }
    Ok(result?)
}

/// What `--stats` says. Loading has the bytes that it read, where it read them.
fn report((bytes, loading): (Option<u64>, Duration), stats: &Stats, memory: &[[String; 2]]) -> String {
    let line = |what: &str, amount: String, time: Duration, rate: String| {
        vec![what.to_owned(), amount, format!("{:.3} s", time.as_secs_f64()), rate]
    };
    let tokens = |what: &str, tokens: usize, time: Duration| {
        line(what, format!("{tokens} tokens"), time, rate(tokens as f64, "tokens/s", time))
    };
    // GB, as buses and disks are measured.
    let read = |bytes: u64| (units::bytes(bytes), rate(bytes as f64 / 1e9, "GB/s", loading));
    let (read, speed) = bytes.map(read).unwrap_or_default();
    let mut rows = vec![
        line("loading", read, loading, speed),
        tokens("prefill", stats.prompt_tokens, stats.prefill),
        tokens("decode", stats.decoded_tokens, stats.decode),
    ];
    rows.extend(memory.iter().map(|row| row.to_vec()));
    units::table(&rows, &[1, 2, 3]).trim_end().to_owned()
}

fn rate(amount: f64, unit: &str, time: Duration) -> String {
    if time.is_zero() { "no time".to_owned() } else { format!("{:.1} {unit}", amount / time.as_secs_f64()) }
}

impl Arguments {
    fn sampling(&self) -> Result<Sampling, Failure> {
        let filtered = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let temperature = self.temperature.unwrap_or(if filtered { 1.0 } else { 0.0 });
        let mut sampling = Sampling::builder().temperature(temperature).repetition_penalty(self.repetition_penalty);
        if let Some(top_k) = self.top_k {
            sampling = sampling.top_k(top_k);
        }
        if let Some(top_p) = self.top_p {
            sampling = sampling.top_p(top_p);
        }
        if let Some(min_p) = self.min_p {
            sampling = sampling.min_p(min_p);
        }
        Ok(sampling.build().map_err(Error::from)?)
    }
}

fn number(text: &str, allowed: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok().filter(|value| value.is_finite());
    value.filter(|&value| allowed(value)).ok_or_else(|| format!("expected {expected}"))
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "a number, 0 or more")
}

fn fraction(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0 and at most 1")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |value| (0.0..1.0).contains(&value), "a number, 0 or more and below 1")
}

fn penalty(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_range() {
        assert_eq!(temperature("0"), Ok(0.0));
        assert_eq!(fraction("1"), Ok(1.0));
        for wrong in ["-1", "nan", "inf", "x", ""] {
            assert!(temperature(wrong).is_err() && fraction(wrong).is_err() && penalty(wrong).is_err(), "{wrong}");
        }
        assert_eq!(share("0"), Ok(0.0));
        assert!(share("1").is_err() && fraction("0").is_err() && fraction("1.1").is_err() && penalty("0").is_err());
    }

    #[test]
    fn the_report_has_rates() {
        let stats = Stats {
            prompt_tokens: 10,
            prefill: Duration::from_millis(500),
            new_tokens: 5,
            decoded_tokens: 4,
            decode: Duration::ZERO,
        };
        let memory = [["peak memory".to_owned(), "1.0 GiB".to_owned()]];
        let loading = (Some(3 << 30), Duration::from_millis(500));
        let report = report(loading, &stats, &memory);
        assert!(report.contains("prefill") && report.contains("20.0 tokens/s"), "{report}");
        assert!(report.contains("no time") && report.contains("peak memory"), "{report}");
        assert!(report.contains("3.0 GiB") && report.contains("6.4 GB/s"), "{report}");
    }
}
