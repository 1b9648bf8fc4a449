//! Faults as they happen: owns how each is done to the world and undone, and what is noted of it.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use stagegate_testkit::{proxy::Mode, storm::Answer};
use tokio::{task::JoinSet, time::sleep};

use super::{
    schedule::{Fault, Kind},
    world::{Orphans, WindowKind, World},
};

/// The breaker before a shared cache that failed stays open so long, and an answer that is on its way takes a moment.
const CACHE_AFTERMATH_S: f64 = 7.0;
/// A short freeze, as a share of the TTL. Before it a heartbeat may be a third old, after it the next one takes a moment,
/// and the fence is at 0.7.
const SHORT_MAX_TTL: f64 = 0.25;
/// How long a replica may take until it is ready again.
const BACK_LIMIT: Duration = Duration::from_mins(1);
/// A provider that limits the rate answers so many calls in each window.
const RATE: (u32, Duration) = (30, Duration::from_secs(3));
/// The pause between two replicas of a rolling restart: until the balancer has seen that the last one is back.
const ROLLING_PAUSE: Duration = Duration::from_millis(800);

/// Performs a schedule. Faults overlap, but no two about the same thing.
pub(crate) async fn perform(world: &Arc<World>, schedule: Vec<Fault>) -> anyhow::Result<()> {
    let mut under_way = JoinSet::new();
    for fault in schedule {
        world.timeline.until(fault.at_s).await;
        let world = Arc::clone(world);
        under_way.spawn(async move {
            let done = Box::pin(one(&world, fault)).await;
            done.with_context(|| format!("the fault {:?} could not be made or mended", fault.kind))
        });
        while let Some(done) = under_way.try_join_next() {
            done??;
        }
    }
    while let Some(done) = under_way.join_next().await {
        done??;
    }
    Ok(())
}

fn between(fault: Fault, shortest_s: f64, longest_s: f64) -> Duration {
    Duration::from_secs_f64(shortest_s + (longest_s - shortest_s) * fault.length)
}

async fn one(world: &World, fault: Fault) -> anyhow::Result<()> {
    match fault.kind {
        Kind::Kill | Kind::Freeze | Kind::FreezeShortly | Kind::Term | Kind::Partition => {
            of_replica(world, fault).await
        }
        Kind::Rolling => rolling(world).await,
        Kind::PostgresRestart | Kind::PostgresCrash | Kind::PostgresSessions | Kind::DiskFull => {
            of_postgres(world, fault).await
        }
        Kind::RedisKill | Kind::RedisFlush | Kind::RedisBlackhole => of_redis(world, fault).await,
        Kind::CutPostgres => {
            world.timeline.say(fault.kind.name());
            let now_s = world.timeline.now_s();
            world.replicas.iter().for_each(|replica| replica.postgres.cut_mid_reply());
            world.window(fault.kind.name(), WindowKind::StoreAway, now_s, now_s + 1.0);
            Ok(())
        }
        Kind::CutRedis => {
            world.timeline.say(fault.kind.name());
            let now_s = world.timeline.now_s();
            world.replicas.iter().for_each(|replica| replica.redis.cut_mid_reply());
            // A connection that is idle now is cut when it is used next.
            world.window(fault.kind.name(), WindowKind::CacheAway(None), now_s, now_s + CACHE_AFTERMATH_S);
            Ok(())
        }
        Kind::ProviderDown => {
            let _busy = world.provider_busy.lock().await;
            world.timeline.say(fault.kind.name());
            let from_s = world.timeline.now_s();
            world.storm.set_outage(Some(Answer::Overloaded));
            sleep(between(fault, 1.0, 4.0)).await;
            world.storm.set_outage(None);
            world.window(fault.kind.name(), WindowKind::Other, from_s, world.timeline.now_s());
            Ok(())
        }
        Kind::ProviderLimited => {
            let _busy = world.provider_busy.lock().await;
            world.timeline.say(fault.kind.name());
            let from_s = world.timeline.now_s();
            world.storm.set_rate(Some(RATE));
            sleep(between(fault, 3.0, 7.0)).await;
            world.storm.set_rate(None);
            world.window(fault.kind.name(), WindowKind::Other, from_s, world.timeline.now_s());
            Ok(())
        }
    }
}

async fn of_replica(world: &World, fault: Fault) -> anyhow::Result<()> {
    let (index, replica) = (fault.replica, &world.replicas[fault.replica]);
    let _busy = replica.busy.lock().await;
    if fault.kind == Kind::Term {
        return terminate(world, index).await;
    }
    let ttl_s = world.plan.lease_ttl_s();
    let what = format!("{}: {}", replica.name(), fault.kind.name());
    let orphans = world.orphans(&what, index).await;
    world.timeline.say(&what);
    let from_s = world.timeline.now_s();
    match fault.kind {
        Kind::Kill => {
            replica.program()?.stop("KILL").await?;
            sleep(between(fault, 0.1, ttl_s + 3.0)).await;
            replica.launch_until_ready(BACK_LIMIT).await?;
        }
        Kind::Freeze => {
            replica.program()?.freeze()?;
            sleep(between(fault, ttl_s + 0.5, ttl_s + 3.0)).await;
            replica.program()?.thaw();
        }
        Kind::FreezeShortly => {
            replica.program()?.freeze()?;
            sleep(between(fault, 0.1, ttl_s * SHORT_MAX_TTL)).await;
            replica.program()?.thaw();
        }
        _ => {
            replica.postgres.set(Mode::Blackhole);
            sleep(between(fault, ttl_s + 0.5, ttl_s + 3.0)).await;
            replica.postgres.set(Mode::Pass);
        }
    }
    let to_s = world.timeline.now_s();
    world.timeline.say(&format!("{what}: over"));
    if fault.kind == Kind::FreezeShortly {
        world.window(&what, WindowKind::Paused(index), from_s, to_s);
        let paused = orphans.map(|orphans| (Orphans { at_s: from_s, ..orphans }, to_s));
        world.seen().paused.extend(paused);
        return Ok(());
    }
    // A frozen one begins to read what it received when it goes on, and is fenced a moment later.
    let after_s = if fault.kind == Kind::Kill { 0.0 } else { 1.5 };
    world.window(&what, WindowKind::Interrupted(index), from_s, to_s + after_s);
    if fault.kind == Kind::Freeze {
        world.window(&format!("{}: wakes", replica.name()), WindowKind::Woken(index), to_s - 0.1, to_s + 1.0);
    }
    world.seen().orphans.extend(orphans.map(|orphans| Orphans { at_s: from_s, ..orphans }));
    Ok(())
}

/// Ends a replica in order and starts it again. Its lock is held by the caller.
pub(crate) async fn terminate(world: &World, index: usize) -> anyhow::Result<()> {
    let replica = &world.replicas[index];
    let what = format!("{}: SIGTERM, restart", replica.name());
    world.timeline.say(&what);
    let from_s = world.timeline.now_s();
    let status = replica.program()?.stop("TERM").await?;
    let ended_s = world.timeline.now_s();
    world.seen().stops.push((replica.name().to_owned(), from_s, ended_s - from_s, status));
    // It excuses nothing: what is under way may finish. Where it could not, the replica says so in its log.
    world.window(&what, WindowKind::Other, from_s, ended_s);
    replica.launch_until_ready(BACK_LIMIT).await
}

async fn rolling(world: &World) -> anyhow::Result<()> {
    world.timeline.say("rolling restart");
    let from_s = world.timeline.now_s();
    for (index, replica) in world.replicas.iter().enumerate() {
        let _busy = replica.busy.lock().await;
        terminate(world, index).await?;
        sleep(ROLLING_PAUSE).await;
    }
    world.window("rolling restart", WindowKind::Other, from_s, world.timeline.now_s());
    Ok(())
}

async fn of_postgres(world: &World, fault: Fault) -> anyhow::Result<()> {
    let _busy = world.postgres_busy.lock().await;
    world.timeline.say(fault.kind.name());
    let from_s = world.timeline.now_s();
    match fault.kind {
        Kind::PostgresRestart => {
            world.postgres.stop().await?;
            sleep(between(fault, 0.0, 2.0)).await;
            world.postgres.start().await?;
        }
        Kind::PostgresCrash => {
            world.postgres.crash().await?;
            sleep(between(fault, 0.0, 4.0)).await;
            world.postgres.start().await?;
        }
        Kind::PostgresSessions => {
            let ended = world.auditor().await?.terminate_sessions().await?;
            world.timeline.say(&format!("{ended} sessions were terminated"));
        }
        _ => {
            let Some(disk) = &world.disk else { return Ok(()) };
            disk.fill()?;
            sleep(between(fault, 1.5, 5.0)).await;
            disk.free()?;
            // Where it did not survive that, its supervisor starts it again.
            if !world.postgres.is_running() {
                world.seen().notes.push(format!("Postgres ended with its disk full: {}", world.postgres.log_tail()));
                world.postgres.crash().await?;
                world.postgres.start().await?;
            }
        }
    }
    world.timeline.say(&format!("{}: over", fault.kind.name()));
    world.window(fault.kind.name(), WindowKind::StoreAway, from_s, world.timeline.now_s());
    Ok(())
}

async fn of_redis(world: &World, fault: Fault) -> anyhow::Result<()> {
    let _busy = world.redis_busy.lock().await;
    world.timeline.say(fault.kind.name());
    let from_s = world.timeline.now_s();
    match fault.kind {
        Kind::RedisKill => {
            world.redis.stop().await?;
            sleep(between(fault, 0.2, 3.0)).await;
            world.redis.start().await?;
        }
        Kind::RedisFlush => world.redis.flush().await?,
        _ => {
            world.replicas.iter().for_each(|replica| replica.redis.set(Mode::Blackhole));
            sleep(between(fault, 1.5, 5.0)).await;
            world.replicas.iter().for_each(|replica| replica.redis.set(Mode::Pass));
        }
    }
    let to_s = world.timeline.now_s();
    world.window(fault.kind.name(), WindowKind::CacheAway(None), from_s, to_s + CACHE_AFTERMATH_S);
    if matches!(fault.kind, Kind::RedisKill | Kind::RedisFlush) {
        world.window(fault.kind.name(), WindowKind::CacheLost, from_s, to_s);
    }
    Ok(())
}
