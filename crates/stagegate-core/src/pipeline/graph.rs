//! The DAG's shape: owns order, cycles and what is upstream of what. Knows stages only as numbers.

use std::collections::BTreeSet;

/// For each stage, those that it needs; in the author's order.
pub(super) type Needs = [Vec<usize>];

/// The stages in topological order; among those that are ready the author's first comes first. In a cycle's place,
/// the rest of the stages is missing.
pub(super) fn order(needs: &Needs) -> Vec<usize> {
    let mut missing: Vec<usize> = needs.iter().map(Vec::len).collect();
    let mut ready: BTreeSet<usize> = (0..needs.len()).filter(|stage| missing[*stage] == 0).collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(stage) = ready.pop_first() {
        order.push(stage);
        for (dependent, needed) in needs.iter().enumerate() {
            if needed.contains(&stage) {
                missing[dependent] -= 1;
                if missing[dependent] == 0 {
                    ready.insert(dependent);
                }
            }
        }
    }
    order
}

/// Circles, each told once: `[a, b]` where a needs b and b needs a. Circles that share a stage are one.
pub(super) fn cycles(needs: &Needs) -> Vec<Vec<usize>> {
    let mut needs = needs.to_vec();
    let mut found = Vec::new();
    loop {
        let sorted: BTreeSet<usize> = order(&needs).into_iter().collect();
        let Some(start) = (0..needs.len()).find(|stage| !sorted.contains(stage)) else { return found };
        // What is left after sorting needs something that is left, so that the walk comes round.
        let mut walk = vec![start];
        let cycle = loop {
            let last = walk[walk.len() - 1];
            let Some(next) = needs[last].iter().copied().find(|need| !sorted.contains(need)) else { return found };
            if let Some(position) = walk.iter().position(|stage| *stage == next) {
                break walk.split_off(position);
            }
            walk.push(next);
        };
        for stage in &cycle {
            needs[*stage].clear();
        }
        let first = (0..cycle.len()).min_by_key(|position| cycle[*position]).unwrap_or(0);
        found.push(cycle[first..].iter().chain(&cycle[..first]).copied().collect());
    }
}

/// For each stage, everything that is committed before it starts. Stands cycles.
pub(super) fn upstream(needs: &Needs) -> Vec<BTreeSet<usize>> {
    (0..needs.len())
        .map(|stage| {
            let mut seen = BTreeSet::new();
            let mut open = needs[stage].clone();
            while let Some(next) = open.pop() {
                if seen.insert(next) {
                    open.extend(&needs[next]);
                }
            }
            seen
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn among_ready_stages_the_authors_order_holds() {
        assert_eq!(order(&[vec![2], vec![], vec![]]), [1, 2, 0]);
        assert_eq!(order(&[vec![], vec![0], vec![0], vec![1, 2]]), [0, 1, 2, 3]);
    }

    #[test]
    fn each_circle_is_told_once() {
        let needs = [vec![1], vec![0], vec![0], vec![4], vec![5], vec![3], vec![]];
        assert_eq!(cycles(&needs), [vec![0, 1], vec![3, 4, 5]]);
        assert_eq!(cycles(&[vec![0]]), [vec![0]]);
    }

    proptest! {
        #[test]
        fn order_and_cycles_agree(edges in proptest::collection::vec((0_usize..12, 0_usize..12), 0..30)) {
            let mut needs = vec![Vec::new(); 12];
            for (from, to) in edges {
                if !needs[from].contains(&to) {
                    needs[from].push(to);
                }
            }
            let order = order(&needs);
            prop_assert_eq!(order.len() == 12, cycles(&needs).is_empty());
            for (position, stage) in order.iter().enumerate() {
                prop_assert!(needs[*stage].iter().all(|need| order[..position].contains(need)));
            }
        }
    }
}
