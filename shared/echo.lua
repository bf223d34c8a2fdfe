-- One echo: tell who is there, read the heads, and send the replica a probe through the publish path.
--
-- It writes, so that only a primary carries it out: a server that was demoted refuses, and the replica learns of it.
--
-- KEYS  for each namespace three:
--       head      hash {epoch, seq}
--       presence  kept longer than until the next echo, and until no proof of before can count any more: a replica
--                 that is gone disappears by itself
--       registry  sorted set of the replicas that have a presence, by when it ends on this server's clock in ms
-- ARGV  channel of the probe, the probe
--       PUBLISH, or in a cluster SPUBLISH
--       replica, lifetime of its presences in ms
--       presences as JSON, one for each namespace
--
-- Returns {replication id, complaint, epoch, seq, epoch, seq, …}; an epoch is false where there is none, and the
-- complaint is empty unless the replica could not be registered.

local EXPIRED_MAX, DAY_MS = 16, 86400000
local replica, lifetime_ms = ARGV[4], tonumber(ARGV[5])

local complaint = ''
-- To be listed is a courtesy. That it fails must not cost a replica its proof.
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    complaint = answer.err
    return nil
  end
  return answer
end

for i = 1, #KEYS, 3 do
  redis.call('SET', KEYS[i + 1], ARGV[5 + (i + 2) / 3], 'PX', ARGV[5])
end
redis.call(ARGV[3], ARGV[1], ARGV[2])

local time = try('TIME')
if time then
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 3, #KEYS, 3 do
    try('ZADD', KEYS[i], string.format('%.0f', now_ms + lifetime_ms), replica)
    -- A few at a time: each echo adds one at most, so that none is left over for long.
    local expired = try('ZRANGEBYSCORE', KEYS[i], '-inf', string.format('%.0f', now_ms), 'LIMIT', 0, EXPIRED_MAX)
    if expired and #expired > 0 then
      try('ZREM', KEYS[i], unpack(expired))
    end
    try('PEXPIRE', KEYS[i], DAY_MS)
  end
end

local answer = {redis.call('INFO', 'replication'):match('master_replid:(%x+)') or '', complaint}
for i = 1, #KEYS, 3 do
  local head = redis.call('HMGET', KEYS[i], 'epoch', 'seq')
  answer[#answer + 1] = head[1]
  answer[#answer + 1] = head[2]
end
return answer
