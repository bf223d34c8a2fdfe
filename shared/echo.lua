-- One echo: tell who is there, read the heads, and send the replica a probe through the publish path.
--
-- It writes, so that only a primary carries it out: a server that was demoted refuses, and the replica learns of it.
--
-- KEYS  presence  kept a little longer than until the next echo: a replica that is gone disappears by itself
--       heads     hash {epoch, seq} of each namespace
-- ARGV  presence as JSON, its lifetime in ms
--       channel of the probe, the probe
--       PUBLISH, or in a cluster SPUBLISH
--
-- Returns {replication id, epoch, seq, epoch, seq, …}; an epoch is false where there is none.

redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call(ARGV[5], ARGV[3], ARGV[4])

local answer = {redis.call('INFO', 'replication'):match('master_replid:(%x+)') or ''}
for i = 2, #KEYS do
  local head = redis.call('HMGET', KEYS[i], 'epoch', 'seq')
  answer[2 * i - 2] = head[1]
  answer[2 * i - 1] = head[2]
end
return answer
