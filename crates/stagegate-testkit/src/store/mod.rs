//! The contract suite of [`Store`]: every promise of its documentation as one test that knows no implementation.
//! Each store runs it with [`store_contract!`](crate::store_contract), and [`random`] runs the same random commands
//! into two stores and compares.
//!
//! What the suite pins where the trait's words leave room:
//! - A claim changes only the lease: `state` and `started_at` stay what the last commit (or the submit) wrote. A run
//!   that is leased with its insert is `running` and was started when it was accepted.
//! - A submit that asks for a lease and gets none leaves a run that only was accepted: of its events only the leading
//!   `run.accepted` is kept, and no stage.
//! - An idempotency key's age is told by the runs' `created_at`, not by the database's clock.
//! - A second checkpoint of a stage is passed over; the first one stays. The rest of its commit happens.
//! - A retry removes the signals that were left before it, and `cancel_requested` with them.
//! - A claim answers in the order in which it takes. A run waits since it was accepted, or since its `start_at` where
//!   that is later; a released, parked or handed back one since then.
//! - All runs of one [`lane`](stagegate_core::fair::Limits::lane) have the same limits, so that a used up lane can be
//!   passed over as a whole.
//! - Runs of dead replicas wait to be claimed: the backlog and the depths count them so before anybody has found them.
//!   Depths leave out what waits for a person.
//! - A purge sets the checkpoints' outputs to null and the attempts' to none; it counts those that it purged now, and
//!   the first time stays. What succeeded cannot be retried whether it was purged or not.

#![expect(clippy::missing_panics_doc, reason = "a promise that is broken panics; that is what the suite is for")]

pub mod commits;
pub mod crashes;
pub mod fairness;
pub mod fixtures;
pub mod gauges;
pub mod keys;
pub mod leases;
pub mod limits;
pub mod news;
pub mod pipelines;
pub mod plain;
pub mod random;
pub mod reading;
pub mod retention;
pub mod signals;
pub mod starts;
pub mod submits;
pub mod vocabulary;

use std::{any::Any, sync::Arc};

use stagegate_core::Store;

/// A fresh, empty, migrated store under test, and whatever must live as long as it.
pub struct Subject {
    /// The store.
    pub store: Arc<dyn Store>,
    _keep: Box<dyn Any + Send + Sync>,
}

impl Subject {
    /// A store, and what must live as long as it: its database, its folder.
    pub fn new(store: Arc<dyn Store>, keep: impl Any + Send + Sync) -> Self {
        Self { store, _keep: Box::new(keep) }
    }
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject").field("store", &self.store).finish_non_exhaustive()
    }
}

/// One `#[tokio::test]` for each promise of the store's contract.
///
/// Takes the absolute path of an `async fn() -> Subject`: `store_contract!(crate::contract::subject);`
#[macro_export]
macro_rules! store_contract {
    ($make:path) => {
        $crate::store_contract! { @modules $make,
            pipelines {
                the_same_content_is_the_same_version
                a_quota_bounds_pipelines_and_versions_of_a_tenant
                concurrent_registrations_never_overstep_the_quota
                versions_are_numbered_per_tenant_and_name
                concurrent_registrations_are_numbered_without_gaps
                the_newest_version_is_the_default
                pipelines_and_versions_page_in_order
                a_definition_comes_back_as_it_was
            }
            submits {
                a_submitted_run_reads_back
                submitting_again_changes_nothing
                a_run_can_be_leased_with_its_insert
                a_replica_that_is_not_alive_is_given_no_lease
                an_idempotency_key_finds_its_run
                an_idempotency_key_belongs_to_its_tenant
                an_idempotency_key_is_forgotten_after_its_time
                concurrent_submits_with_one_key_make_one_run
                a_conflict_leaves_the_rest_of_its_batch_alone
                any_text_and_number_comes_back_as_it_was
                a_large_input_comes_back_as_it_was
            }
            reading {
                what_is_not_there_is_none
                tenants_are_walls_for_every_read
                a_stage_is_read_with_its_newest_attempts_alone
                lists_are_newest_first_and_page_without_gaps
                lists_filter_by_everything
                events_are_gap_free_and_page
            }
            leases {
                priority_goes_first_then_who_has_waited_longest
                a_claim_changes_only_the_lease
                two_claimers_never_share_a_run
                a_replica_that_is_not_alive_claims_nothing
                a_dead_replicas_runs_are_taken_once_with_a_higher_epoch
                a_replica_that_was_declared_dead_is_told_so
                a_live_replicas_runs_are_left_alone
                released_runs_can_be_claimed_at_once
                a_replica_that_leaves_hands_everything_back
                epochs_only_grow
                load_gives_everything_that_an_owner_needs
                the_queue_is_counted
            }
            crashes {
                each_owner_that_dies_is_counted
                progress_begins_the_count_anew
                what_is_handed_back_has_not_crashed
                a_panic_counts_and_the_run_waits
                a_retry_begins_the_count_anew
            }
            commits {
                a_commit_happens_whole
                repeating_a_commit_changes_nothing
                a_stale_lease_changes_nothing
                a_gap_in_the_events_changes_nothing
                a_stale_step_fails_alone
                a_stage_has_one_checkpoint_ever
                a_finished_run_is_nobodys
                a_parked_run_waits_for_its_time
                many_steps_fit_one_commit
                concurrent_commits_of_one_step_happen_once
                any_text_and_number_comes_back_as_it_was
                a_large_output_comes_back_as_it_was
            }
            plain {
                what_passes_at_once_is_read_whole
                whoever_takes_over_gets_what_passed_at_once
                what_passed_at_once_is_purged_and_deleted
                what_passed_at_once_is_not_held
                what_was_not_begun_is_not_told
            }
            signals {
                a_cancel_marks_the_run_once
                a_signal_wakes_a_parked_run
                a_heartbeat_tells_of_each_signal_until_it_is_read
                signals_stay_until_they_are_consumed
                a_run_parked_over_a_signal_can_be_claimed_at_once
                a_signal_that_races_a_park_is_never_lost
                a_signal_that_races_its_reading_is_never_lost
                a_retry_reopens_what_failed
                a_retry_makes_every_earlier_lease_stale
                only_what_failed_can_be_retried
                a_decision_needs_a_held_stage
                an_edited_output_comes_back_byte_for_byte_and_has_a_weight
                a_finished_run_takes_no_cancel_and_no_decision
                signals_keep_to_their_tenant_and_owner
                the_signals_of_many_runs_are_read_at_once
            }
            starts {
                a_delayed_run_cannot_be_claimed_before_its_time
                a_delayed_run_can_be_claimed_after_its_time_by_the_databases_clock
                a_start_in_the_past_is_at_once_and_goes_ahead_of_nobody
                a_cancel_before_its_start_is_obeyed_at_once
                a_start_time_is_read_back
            }
            fairness {
                a_tenants_first_run_goes_before_anothers_backlog
                weights_share_the_room
                a_priority_never_reaches_beyond_its_tenant
                a_claim_is_bounded
                claims_follow_the_rule_to_the_letter
                among_equals_who_has_waited_longest_goes_first
            }
            limits {
                a_pipelines_limit_is_freed_with_the_lease
                a_keys_limit_is_freed_with_the_lease
                a_tenants_limit_is_freed_with_the_lease
                the_default_share_bounds_each_tenant_on_its_own
                limits_keep_to_their_pipeline_and_tenant
                a_used_up_limit_holds_up_nobody_else
                each_run_has_the_limit_that_it_was_accepted_with
                every_lease_of_a_pipeline_counts
                what_is_to_be_cancelled_is_kept_by_no_limit
                what_only_waits_uses_up_nothing
                limits_are_never_exceeded_however_many_claim_at_once
            }
            news {
                news_are_told_of_many_runs_at_once
                news_are_limited_by_run
                news_are_told_of_as_many_as_are_watched
            }
            gauges {
                the_backlog_is_counted_by_tenant_and_pipeline
                what_dead_replicas_own_counts_as_queued
                a_backlog_tells_its_age
                depths_are_counted_by_tenant
                replicas_are_listed_alive_draining_and_dead
                replicas_tell_what_they_own
                a_leases_age_begins_with_its_owner
            }
            retention {
                retention_walks_through_all_runs
                a_purge_removes_payloads_and_nothing_else
                a_purge_can_be_repeated
                what_has_not_ended_is_neither_purged_nor_deleted
                what_was_purged_cannot_be_retried
                a_deleted_run_is_gone_whole
                a_deleted_runs_idempotency_key_is_free_again
                a_run_that_is_being_retried_is_not_deleted
            }
            vocabulary {
                an_unknown_event_comes_back_byte_for_byte
                unknown_fields_of_a_known_event_come_back_byte_for_byte
                unknown_words_of_rows_come_back_as_they_were
                an_unknown_run_state_is_shown_as_it_is
                an_unknown_signal_is_carried_until_it_is_consumed
                a_signal_that_cannot_be_read_is_an_unknown_one
                unknown_fields_survive_a_rewrite
                a_run_in_an_unknown_state_is_left_to_those_who_know_it
            }
            keys {
                a_key_is_found_by_its_hash
                keys_are_listed_by_tenant
                a_key_is_revoked_once
                the_store_answers_and_names_itself
            }
        }
    };
    (@modules $make:path, $($module:ident { $($promise:ident)* })*) => {
        $(
            mod $module {
                $(
                    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                    async fn $promise() {
                        $crate::store::$module::$promise($make().await).await;
                    }
                )*
            }
        )*
    };
}
