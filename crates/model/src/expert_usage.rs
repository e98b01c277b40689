//! Which experts a model's routers use on a text: loads, how even they are, and which experts are chosen together.

use std::collections::BTreeMap;

use crate::{
    Backend, Batch, Config, Error, Model, Observer, Result, Segment,
    backend::TopkIds,
    blocks_for,
    config::{FeedForward, Moe},
};

/// Most tokens of one pass: bounds the memory for activations and the wait for an interruption.
const PASS_TOKENS: usize = 512;

/// What one layer's router chose, counted over any number of passes.
///
/// For E experts, `n_e` is the load of expert e: the number of tokens that chose it. `n_ab` is the number of tokens that chose both
/// a and b. A slot that is unused (-1) counts nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerUsage {
    num_experts: usize,
    tokens: u64,
    /// `[E, E]`: `n_ab`, symmetric; on the diagonal `n_e`.
    counts: Vec<u64>,
}

impl LayerUsage {
    /// Nothing counted yet, of `num_experts` experts.
    pub fn new(num_experts: usize) -> Self {
        Self { num_experts, tokens: 0, counts: vec![0; num_experts * num_experts] }
    }

    /// Counts the choices of some more tokens.
    ///
    /// # Errors
    /// [`Error::Input`], and nothing is counted, if the ids are not `[T, K]`, an expert does not exist, or a token has one twice.
    pub fn add(&mut self, chosen: &TopkIds) -> Result<()> {
        let TopkIds { ids, topk } = chosen;
        if *topk == 0 || !ids.len().is_multiple_of(*topk) {
            return Err(Error::Input(format!("{} experts are not {topk} for each of some tokens", ids.len())));
        }
        for (token, ids) in ids.chunks(*topk).enumerate() {
            for (slot, &id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
                if id as usize >= self.num_experts {
                    let experts = self.num_experts;
                    return Err(Error::Input(format!("token {token} has expert {id}, but there are {experts}")));
                }
                if ids[..slot].contains(&id) {
                    return Err(Error::Input(format!("token {token} has expert {id} twice")));
                }
            }
        }
        for ids in ids.chunks(*topk) {
            self.tokens += 1;
            let experts = || ids.iter().filter(|id| **id >= 0).map(|id| *id as usize);
            for a in experts() {
                for b in experts() {
                    self.counts[a * self.num_experts + b] += 1;
                }
            }
        }
        Ok(())
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Tokens counted.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// `n_e` of every expert. Their sum is the number of choices: T K where every slot is used.
    pub fn loads(&self) -> Vec<u64> {
        (0..self.num_experts).map(|expert| self.together(expert, expert)).collect()
    }

    /// `n_ab`, the tokens that chose both experts; the load where they are the same.
    ///
    /// # Panics
    /// If an expert does not exist.
    pub fn together(&self, a: usize, b: usize) -> u64 {
        assert!(a < self.num_experts && b < self.num_experts, "experts {a} and {b} of {}", self.num_experts);
        self.counts[a * self.num_experts + b]
    }

    /// Load as a multiple of an even load: `n_e / mean(n)`, 0 to E; 1 everywhere if nothing was chosen.
    pub fn relative_loads(&self) -> Vec<f64> {
        let loads = self.loads();
        let total: u64 = loads.iter().sum();
        if total == 0 {
            return vec![1.0; loads.len()];
        }
        let mean = total as f64 / loads.len() as f64;
        loads.iter().map(|load| *load as f64 / mean).collect()
    }

    /// Entropy of the choices over the experts, normalised: `-sum_e p_e ln p_e / ln E` with `p_e = n_e / sum(n)`. 1 if all loads
    /// are equal (or E is 1, or nothing was chosen), 0 if one expert has all.
    pub fn entropy(&self) -> f64 {
        let experts = self.num_experts as f64;
        if self.num_experts < 2 {
            return 1.0;
        }
        let shares = self.relative_loads().into_iter().map(|load| load / experts).filter(|share| *share > 0.0);
        // Rounding may pass the ends.
        (shares.map(|share| -share * share.ln()).sum::<f64>() / experts.ln()).clamp(0.0, 1.0)
    }

    /// Maximal violation of balance, `max(n) / mean(n) - 1`, over all tokens counted: 0 if all loads are equal, E/K - 1 if every token
    /// chose the same K experts. ("Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664,
    /// section 4.1: over a whole text set this is `MaxVio_global`.)
    pub fn max_vio(&self) -> f64 {
        self.relative_loads().into_iter().fold(1.0, f64::max) - 1.0
    }

    /// How much more often than by their loads alone two experts are chosen together, `[E, E]`, symmetric, 1 on the diagonal:
    ///
    /// ```text
    /// lift_ab = (n_ab + 1) / (x_ab + 1)      x_ab = n_a n_b * sum_{a != b} n_ab / sum_{a != b} n_a n_b
    /// ```
    ///
    /// `x_ab` is what independent choices would give: proportional to both loads, with as many pairs in all as there are. (The usual
    /// `n_a n_b / T` would have too many: a token's experts are distinct, which alone makes a pair rarer.) The one token added
    /// on both sides keeps pairs that are too rare to tell near 1; where counts are large it changes nothing.
    pub fn lift(&self) -> Vec<f64> {
        let (experts, loads) = (self.num_experts, self.loads());
        let total: u64 = loads.iter().sum();
        let pairs = (self.counts.iter().sum::<u64>() - total) as f64;
        let square = |value: u64| value as f64 * value as f64;
        let products = square(total) - loads.iter().map(|load| square(*load)).sum::<f64>();
        let rate = if products > 0.0 { pairs / products } else { 0.0 };
        let lift = |at: usize| {
            let (a, b) = (at / experts, at % experts);
            if a == b {
                return 1.0;
            }
            (self.counts[at] as f64 + 1.0) / (loads[a] as f64 * loads[b] as f64 * rate + 1.0)
        };
        (0..experts * experts).map(lift).collect()
    }
}

/// [`LayerUsage`] of all layers that route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertUsage {
    layers: BTreeMap<usize, LayerUsage>,
    tokens: u64,
    sequences: u64,
}

impl ExpertUsage {
    /// The MoE layers' shape, if there are any.
    ///
    /// # Errors
    /// [`Error::Input`] if the model is dense.
    pub fn check(config: &Config) -> Result<&Moe> {
        let routes = config.layers.contains(&FeedForward::Moe);
        config.moe.as_ref().filter(|_| routes).ok_or_else(|| {
            let family = &config.model_type;
            Error::Input(format!("the model is dense ({family}): it has no experts to choose from"))
        })
    }

    /// Runs texts through a model and counts what its routers choose.
    ///
    /// Positions continue through a text up to `context` tokens; then a new sequence begins with its next token, without a token that
    /// begins texts. A sequence goes through the model some hundreds of tokens at a time. Before each pass `on_pass` is told
    /// how many tokens of all texts are done; its error ends the run.
    ///
    /// # Errors
    /// [`Error::Input`] if the model is dense, there is no token, an id is not in the vocabulary, or `context` is 0 or beyond the model's
    /// longest sequence; and whatever the backend or `on_pass` returns.
    pub fn of_texts<B: Backend>(
        model: &Model<B>,
        texts: &[Vec<u32>],
        context: usize,
        on_pass: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let config = model.config();
        let moe = Self::check(config)?;
        if texts.iter().all(Vec::is_empty) {
            return Err(Error::Input("there is no token to route: give at least one text".to_owned()));
        }
        let most = config.max_position_embeddings;
        if context == 0 || context > most {
            return Err(Error::Input(format!("a context of {context} tokens is not between 1 and the model's {most}")));
        }
        let mut counting = Counting {
            usage: Self { layers: BTreeMap::new(), tokens: 0, sequences: 0 },
            num_experts: moe.routing.num_experts(),
            result: Ok(()),
        };
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0).min(context);
        let blocks: Vec<u32> = (0..blocks_for(longest) as u32).collect();
        let mut cache = model.cache(blocks.len())?;
        for sequence in texts.iter().flat_map(|text| text.chunks(context)) {
            counting.usage.sequences += 1;
            for (chunk, ids) in sequence.chunks(PASS_TOKENS).enumerate() {
                on_pass(counting.usage.tokens)?;
                let segments = [Segment { blocks: &blocks, position: chunk * PASS_TOKENS, len: ids.len() }];
                model.forward(&Batch { ids, segments: &segments }, &mut cache, Some(&mut counting))?;
                std::mem::replace(&mut counting.result, Ok(()))?;
                counting.usage.tokens += ids.len() as u64;
            }
        }
        Ok(counting.usage)
    }

    /// Every layer that routes, in order, with its index in the model.
    pub fn layers(&self) -> &BTreeMap<usize, LayerUsage> {
        &self.layers
    }

    /// Tokens counted.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Sequences that they were cut into.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// The layer with the highest [`LayerUsage::max_vio`], the first of equals.
    pub fn most_uneven(&self) -> Option<usize> {
        let higher = |best: Option<(usize, f64)>, (&layer, usage): (&usize, &LayerUsage)| {
            let max_vio = usage.max_vio();
            best.filter(|(_, highest)| *highest >= max_vio).or(Some((layer, max_vio)))
        };
        self.layers.iter().fold(None, higher).map(|(layer, _)| layer)
    }
}

/// Counts what a forward pass shows.
struct Counting {
    usage: ExpertUsage,
    num_experts: usize,
    /// Why a backend's ids could not be counted.
    result: Result<()>,
}

impl Observer for Counting {
    fn hidden(&mut self, _: usize, _: Vec<f32>) {}

    fn topk(&mut self, layer: usize, ids: TopkIds) {
        let usage = self.usage.layers.entry(layer).or_insert_with(|| LayerUsage::new(self.num_experts));
        if self.result.is_ok() {
            self.result = usage.add(&ids);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counted(num_experts: usize, topk: usize, ids: &[i32]) -> LayerUsage {
        let mut usage = LayerUsage::new(num_experts);
        usage.add(&TopkIds { ids: ids.to_vec(), topk }).unwrap();
        usage
    }

    #[test]
    fn loads_and_pairs_by_hand() {
        // Tokens 0 to 3; the last leaves a slot unused.
        let usage = counted(4, 2, &[0, 1, 1, 0, 2, 1, 2, -1]);
        assert_eq!(usage.tokens(), 4);
        assert_eq!(usage.loads(), [2, 3, 2, 0]);
        assert_eq!((usage.together(0, 1), usage.together(1, 2), usage.together(0, 2)), (2, 1, 0));
        assert_eq!(usage.max_vio(), 3.0 / 1.75 - 1.0);
        let p = [2.0 / 7.0, 3.0 / 7.0, 2.0 / 7.0_f64];
        let entropy = -p.iter().map(|p| p * p.ln()).sum::<f64>() / 4.0_f64.ln();
        assert!((usage.entropy() - entropy).abs() < 1e-12);
        // sum n_ab = 2 (2 + 1) = 6 ordered pairs; sum n_a n_b = 49 - (4 + 9 + 4) = 32.
        let expected = 2.0 * 3.0 * 6.0 / 32.0;
        assert!((usage.lift()[1] - 3.0 / (expected + 1.0)).abs() < 1e-12);
        assert_eq!(usage.lift()[3], 1.0, "an expert that nobody chose says nothing");
    }

    #[test]
    fn even_loads_and_the_most_uneven_ones() {
        let even: Vec<i32> = (0..12).collect();
        let even = counted(12, 3, &even);
        assert!((even.entropy() - 1.0).abs() < 1e-12 && even.max_vio().abs() < 1e-12);
        // Every token chooses the same K of E.
        let same = counted(12, 3, &[5, 7, 9].repeat(10));
        assert!((same.max_vio() - (12.0 / 3.0 - 1.0)).abs() < 1e-12);
        assert!((same.entropy() - 3.0_f64.ln() / 12.0_f64.ln()).abs() < 1e-12);
        let one = counted(12, 1, &[4; 10]);
        assert_eq!((one.max_vio(), one.entropy()), (11.0, 0.0));
        assert_eq!(one.lift(), vec![1.0; 144]);
    }

    #[test]
    fn nothing_chosen_is_even() {
        for usage in [LayerUsage::new(4), counted(4, 2, &[-1; 6]), LayerUsage::new(1), LayerUsage::new(0)] {
            assert_eq!((usage.entropy(), usage.max_vio()), (1.0, 0.0));
            assert!(usage.lift().iter().all(|lift| *lift == 1.0));
        }
    }

    #[test]
    fn independent_choices_have_a_lift_of_one() {
        // All pairs of 6 experts equally often, 100 times.
        let pairs: Vec<i32> = (0..6).flat_map(|a| (0..a).flat_map(move |b| [a, b])).collect();
        let usage = counted(6, 2, &pairs.repeat(100));
        assert!(usage.lift().iter().all(|lift| (lift - 1.0).abs() < 1e-12));
        // Experts that always come in twos.
        let usage = counted(4, 2, &[0, 1, 2, 3].repeat(500));
        let lift = usage.lift();
        assert!((lift[1] - 3.0).abs() < 0.02 && lift[2] < 0.01, "{lift:?}");
    }

    #[test]
    fn ids_that_are_no_choice() {
        let mut usage = LayerUsage::new(4);
        let mut refused = |ids: &[i32], topk, words: &str| {
            let error = usage.add(&TopkIds { ids: ids.to_vec(), topk }).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert_eq!(usage, LayerUsage::new(4), "nothing is counted");
        };
        refused(&[0, 1, 2], 2, "3 experts are not 2 for each");
        refused(&[0], 0, "not 0");
        refused(&[0, 1, 0, 4], 2, "token 1 has expert 4, but there are 4");
        refused(&[0, 1, 3, 3], 2, "token 1 has expert 3 twice");
    }

    /// E, K, and for each token an order of all experts, of which it takes the first K.
    fn choices() -> impl Strategy<Value = (usize, usize, Vec<i32>)> {
        (1_usize..12).prop_flat_map(|experts| (Just(experts), 1..=experts)).prop_flat_map(|(experts, topk)| {
            let order = Just((0..experts as i32).collect::<Vec<_>>()).prop_shuffle();
            let tokens = prop::collection::vec(order, 1..40);
            let first = move |tokens: Vec<Vec<i32>>| tokens.iter().flat_map(|order| order[..topk].to_vec()).collect();
            (Just(experts), Just(topk), tokens.prop_map(first))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn laws((experts, topk, ids) in choices()) {
            let usage = counted(experts, topk, &ids);
            let (loads, tokens) = (usage.loads(), usage.tokens());
            prop_assert_eq!(tokens as usize, ids.len() / topk);
            prop_assert_eq!(loads.iter().sum::<u64>() as usize, ids.len());
            prop_assert!(loads.iter().all(|load| *load <= tokens));
            prop_assert!((0.0..=1.0).contains(&usage.entropy()));
            prop_assert!((-1e-12..=experts as f64 / topk as f64 - 1.0 + 1e-12).contains(&usage.max_vio()));
            let lift = usage.lift();
            for a in 0..experts {
                // Each of a's tokens has K - 1 others.
                let others: u64 = (0..experts).filter(|b| *b != a).map(|b| usage.together(a, b)).sum();
                prop_assert_eq!(others, loads[a] * (topk as u64 - 1));
                for b in 0..experts {
                    prop_assert_eq!(usage.together(a, b), usage.together(b, a));
                    prop_assert!(usage.together(a, b) <= loads[a].min(loads[b]));
                    prop_assert_eq!(lift[a * experts + b], lift[b * experts + a]);
                }
            }
        }

        #[test]
        fn other_names_for_experts_move_the_counts((experts, topk, ids) in choices(), by in 0_usize..12) {
            let renamed = |expert: usize| (expert + by) % experts;
            let usage = counted(experts, topk, &ids);
            let ids: Vec<i32> = ids.iter().map(|id| renamed(*id as usize) as i32).collect();
            let other = counted(experts, topk, &ids);
            for a in 0..experts {
                for b in 0..experts {
                    prop_assert_eq!(usage.together(a, b), other.together(renamed(a), renamed(b)));
                }
            }
            prop_assert!((usage.entropy() - other.entropy()).abs() < 1e-9);
            prop_assert!((usage.max_vio() - other.max_vio()).abs() < 1e-9);
        }

        #[test]
        fn passes_add_up((experts, topk, ids) in choices(), at in 0_usize..40) {
            let (first, rest) = ids.split_at((at * topk).min(ids.len()));
            let mut usage = counted(experts, topk, first);
            usage.add(&TopkIds { ids: rest.to_vec(), topk }).unwrap();
            prop_assert_eq!(usage, counted(experts, topk, &ids));
        }
    }
}
