//! Generation over a model whose next token is a function of the sequence alone.

#[path = "common/fake.rs"]
mod fake;

use std::{cell::Cell, path::Path};

use anabranch::Sampling;
use anabranch_model::{Batch, Error, Finish, Forward, GenerateOptions, Generated, Result, Tokenizer, generate};
use fake::{Fake, VOCAB_SIZE};

const LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/llama");

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(Path::new(LLAMA)).expect("the bundled tokenizer")
}

fn options(max_new_tokens: usize, sampling: Sampling) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens,
        sampling,
        seed: 7,
        stop: vec![],
        eos: vec![1],
        batch_size: 64,
        cache_tokens: None,
    }
}

fn sampling() -> Sampling {
    Sampling::builder().temperature(0.8).top_k(50).top_p(0.9).repetition_penalty(1.2).build().expect("valid")
}

/// Runs and checks that what was streamed is the text.
fn run(model: &mut Fake, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<Generated> {
    let mut streamed = vec![String::new(); prompts.len()];
    let generated = generate(model, &tokenizer(), prompts, options, &|| false, &mut |index, piece| {
        assert!(!piece.is_empty());
        streamed[index].push_str(piece);
        Ok(())
    })?;
    for (sequence, streamed) in generated.sequences.iter().zip(streamed) {
        assert_eq!(sequence.text, streamed);
    }
    Ok(generated)
}

fn prompts() -> Vec<Vec<u32>> {
    [3usize, 1, 4000, 17, 2600, 512, 9]
        .iter()
        .map(|&len| (0..len).map(|at| (at * 31 + len) as u32 % 500 + 2).collect())
        .collect()
}

#[test]
fn a_batch_gives_what_each_prompt_gives_alone() {
    for sampling in [Sampling::greedy(), sampling()] {
        let options = options(24, sampling);
        let together = run(&mut Fake::hashing(8192), &prompts(), &options).unwrap();
        for (index, prompt) in prompts().into_iter().enumerate() {
            // The other prompts are short here; the one in question keeps its place, and with it its random stream.
            let mut others = vec![vec![5]; prompts().len()];
            others[index] = prompt;
            let alone = run(&mut Fake::hashing(8192), &others, &options).unwrap();
            assert_eq!(together.sequences[index], alone.sequences[index], "prompt {index}");
        }
        assert_eq!(together.stats.prompt_tokens, prompts().iter().map(Vec::len).sum::<usize>());
        assert_eq!(together.stats.new_tokens, together.sequences.iter().map(|s| s.ids.len()).sum::<usize>());
        assert_eq!(together.stats.decoded_tokens, together.stats.new_tokens - 7);
    }
}

/// Many prompts with room for few: what waits, or gives its blocks back and comes again, gets what it would have got.
#[test]
fn a_small_cache_makes_prompts_wait_and_changes_nothing() {
    for sampling in [Sampling::greedy(), sampling()] {
        let prompts: Vec<Vec<u32>> = (1..60).map(|len| vec![len % 500 + 2; len as usize * 3]).collect();
        let roomy = GenerateOptions { batch_size: 64, ..options(150, sampling) };
        let expected = run(&mut Fake::hashing(8192), &prompts, &roomy).unwrap();
        for (batch_size, cache_tokens, blocks) in [(64, Some(700), 11), (3, None, 6 + 6 + 5), (1, Some(400), 6)] {
            let mut model = Fake::hashing(8192);
            let tight = GenerateOptions { batch_size, cache_tokens, ..roomy.clone() };
            assert_eq!(run(&mut model, &prompts, &tight).unwrap().sequences, expected.sequences);
            assert!(model.passes.iter().all(|pass| pass.len() <= batch_size));
            // The longest are of 177 + 150 tokens, the last of which is not computed: 6 blocks.
            assert_eq!(model.blocks, Some(blocks));
        }
        let small = GenerateOptions { cache_tokens: Some(300), ..roomy };
        let error = run(&mut Fake::hashing(8192), &prompts, &small).unwrap_err().to_string();
        assert!(
            error.starts_with("a prompt of 174 tokens with its output may need 323 tokens of cache, which holds 320"),
            "{error}"
        );
    }
}

#[test]
fn greedy_follows_the_largest_logit() {
    let mut model = Fake::hashing(4096);
    let prompt = vec![10, 20, 30];
    let generated = run(&mut model, std::slice::from_ref(&prompt), &options(16, Sampling::greedy())).unwrap();
    let mut ids = prompt;
    for &id in &generated.sequences[0].ids {
        let row = model.row(&ids);
        assert!(row.iter().all(|&logit| logit <= row[id as usize]));
        ids.push(id);
    }
    assert_eq!(generated.sequences[0].text, tokenizer().decode(&generated.sequences[0].ids).unwrap());
}

#[test]
fn seeds_are_reproducible_and_differ() {
    let prompts = vec![vec![10], vec![10]];
    let with_seed = |seed| {
        let options = GenerateOptions { seed, ..options(24, sampling()) };
        run(&mut Fake::hashing(4096), &prompts, &options).unwrap().sequences
    };
    let first = with_seed(1);
    assert_eq!(first, with_seed(1));
    assert_ne!(first, with_seed(2));
    assert_ne!(first[0], first[1], "each sequence has its own stream");
}

#[test]
fn long_prompts_are_read_in_bounded_passes() {
    let mut model = Fake::hashing(8192);
    run(&mut model, &prompts(), &options(2, Sampling::greedy())).unwrap();
    // At most 512 tokens of prompts, beside those that decode.
    let pieces = |pass: &[(usize, usize)]| pass.iter().map(|(_, len)| len).filter(|len| **len > 1).sum::<usize>();
    assert!(model.passes.iter().all(|pass| pieces(pass) <= 512), "{:?}", model.passes);
    assert_eq!(model.passes.iter().flatten().filter(|(_, len)| *len == 1).count(), 1 + 7);
    // Where a prompt is cut must not depend on the others, or rounding would.
    assert!(model.passes.iter().flatten().all(|(position, len)| *len == 1 || position.is_multiple_of(512)));
}

#[test]
fn an_eos_token_ends_a_sequence_and_it_leaves_the_batch() {
    let text = tokenizer().encode("good").unwrap();
    for eos in [vec![1], vec![300, 1]] {
        let script = [text.as_slice(), &[1], &[5; 9]].concat();
        let mut model = Fake::saying(script);
        // The second prompt is further into the script, so it ends earlier.
        let prompts = [vec![9], vec![9, 9]];
        let generated = run(&mut model, &prompts, &GenerateOptions { eos, ..options(9, Sampling::greedy()) }).unwrap();
        let [first, second] = generated.sequences.as_slice() else { panic!("two sequences") };
        assert_eq!((first.finish, second.finish), (Finish::Eos, Finish::Eos));
        assert_eq!(first.ids, [text.as_slice(), &[1]].concat());
        assert_eq!(first.text, "good");
        assert_eq!(second.ids.len() + 1, first.ids.len());
        assert_eq!(model.passes.last().unwrap().len(), 1, "the first is alone in the end");
    }
}

#[test]
fn a_stop_string_over_several_tokens_ends_the_text_before_it() {
    let script = tokenizer().encode("the river→END and more").unwrap();
    let stop = vec!["zzz".to_owned(), "→END".to_owned()];
    let options = GenerateOptions { stop, ..options(64, Sampling::greedy()) };
    let generated = run(&mut Fake::saying(script), &[vec![9]], &options).unwrap();
    assert_eq!(generated.sequences[0].text, "the river");
    assert_eq!(generated.sequences[0].finish, Finish::Stop);
}

#[test]
fn text_held_back_comes_out_at_the_limit() {
    let script = tokenizer().encode("the river EN").unwrap();
    let limit = script.len();
    let options = GenerateOptions { stop: vec!["END".to_owned()], ..options(limit, Sampling::greedy()) };
    let generated = run(&mut Fake::saying(script), &[vec![9]], &options).unwrap();
    assert_eq!((generated.sequences[0].text.as_str(), generated.sequences[0].finish), ("the river EN", Finish::Length));
}

#[test]
fn generation_stops_where_the_positions_end() {
    let mut model = Fake::hashing(20);
    let generated = run(&mut model, &[vec![5; 15], vec![5; 19]], &options(usize::MAX, Sampling::greedy())).unwrap();
    let found: Vec<_> = generated.sequences.iter().map(|s| (s.ids.len(), s.finish)).collect();
    assert_eq!(found, [(5, Finish::Length), (1, Finish::Length)]);
    assert_eq!(model.blocks, Some(2));
}

#[test]
fn what_cannot_be_generated_from_is_refused_before_anything_is_computed() {
    let mut model = Fake::hashing(20);
    let greedy = options(4, Sampling::greedy());
    let mut message = |prompts: &[Vec<u32>], options: &GenerateOptions| {
        let error = run(&mut model, prompts, options).unwrap_err();
        assert!(matches!(error, Error::Input(_)));
        assert!(model.passes.is_empty() && model.blocks.is_none());
        error.to_string()
    };
    assert_eq!(message(&[], &greedy), "there is no prompt: give at least one");
    assert_eq!(message(&[vec![3], vec![]], &greedy), "prompt 1 is empty: give it at least one token");
    let long = message(&[vec![3; 20]], &greedy);
    assert!(
        long.starts_with("prompt 0 has 20 tokens, but the model has 20 positions (max_position_embeddings)"),
        "{long}"
    );
    let unknown = message(&[vec![3, 512]], &greedy);
    assert!(unknown.starts_with("prompt 0 holds the token id 512 at position 1, but the model's vocabulary has 512"));
    assert_eq!(message(&[vec![3]], &options(0, Sampling::greedy())), "max_new_tokens must be at least 1, got 0");
    let none = GenerateOptions { batch_size: 0, ..greedy.clone() };
    assert_eq!(message(&[vec![3]], &none), "batch_size must be at least 1, got 0");
    let stop = GenerateOptions { stop: vec![String::new()], ..greedy.clone() };
    assert!(message(&[vec![3]], &stop).contains("a stop string is empty"));
}

#[test]
fn cancelling_ends_the_run_after_what_was_streamed() {
    let script = tokenizer().encode("the river flows on and on").unwrap();
    let asked = Cell::new(0);
    let mut streamed = String::new();
    let cancelled = || {
        asked.set(asked.get() + 1);
        asked.get() > 4
    };
    let mut model = Fake::saying(script);
    let result = generate(
        &mut model,
        &tokenizer(),
        &[vec![9]],
        &options(64, Sampling::greedy()),
        &cancelled,
        &mut |_, piece| {
            streamed.push_str(piece);
            Ok(())
        },
    );
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!(model.passes.len(), 4);
    assert!(!streamed.is_empty() && "the river flows on and on".starts_with(&streamed));
}

#[test]
fn a_failing_callback_ends_the_run() {
    let mut model = Fake::saying(tokenizer().encode("the river").unwrap());
    let closed = || Error::io("write", "stdout")(std::io::ErrorKind::BrokenPipe.into());
    let result =
        generate(&mut model, &tokenizer(), &[vec![9]], &options(64, Sampling::greedy()), &|| false, &mut |_, _| {
            Err(closed())
        });
    assert!(matches!(result, Err(Error::Io { .. })));
    assert_eq!(model.passes.len(), 1);
}

#[test]
fn logits_without_a_distribution_are_an_error() {
    struct Broken(f32);
    impl Forward for Broken {
        fn vocab_size(&self) -> usize {
            VOCAB_SIZE
        }
        fn max_position_embeddings(&self) -> usize {
            20
        }
        fn reset(&mut self, _: usize) -> Result<()> {
            Ok(())
        }
        fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
            let rows = if self.0.is_nan() { batch.segments.len() } else { 0 };
            Ok(vec![self.0; rows * VOCAB_SIZE])
        }
    }
    let run = |mut model: Broken| {
        let greedy = options(4, Sampling::greedy());
        generate(&mut model, &tokenizer(), &[vec![9]], &greedy, &|| false, &mut |_, _| Ok(())).unwrap_err().to_string()
    };
    assert_eq!(run(Broken(f32::NAN)), "sampling: logits must be free of NaN and plus infinity, got NaN for token 0");
    assert_eq!(run(Broken(0.0)), "sampling: logits must be 1 rows of 512, got 0 numbers");
}
