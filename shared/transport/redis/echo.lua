-- One echo: register the replica, read the heads, and send the replica a probe through the publish path.
--
-- It writes, so that only a primary runs it: a server that was demoted refuses, and the replica learns of that.
--
-- KEYS  for each namespace three:
--       head      hash {epoch, seq, digest, digest_seq, lease_ms}. It is created if missing, to tell "never published
--                 to" from "lost". `lease_ms` is the longest lifetime of a presence so far: for that long after a loss
--                 of the registry, an unlisted replica may serve from its caches.
--       presence  expires after the next echo is due and after every earlier proof has run out: a replica that has
--                 stopped disappears by itself
--       registry  sorted set of the replicas that have a presence; the score is when it ends, on this server's clock in
--                 ms. One more member, ` since=<ms>`, is the time of creation; its score is never reached.
-- ARGV  channel of the probe, the probe
--       PUBLISH, or in a cluster SPUBLISH
--       replica, lifetime of its presences in ms
--       epoch, for namespaces that have none
--       presences as JSON, one for each namespace; an empty one renews the lifetime of the presence that is there
--
-- Returns {replication id, complaint, epoch, seq, digest, digest_seq, 1 or 0, epoch, …}; a digest is false where there is
-- none, 0 says that the presence to renew was gone, and the complaint is empty unless the replica could not be registered.

local EXPIRED_MAX, DAY_MS, NEVER_MS = 16, 86400000, 9e15
local replica, lifetime_ms = ARGV[4], tonumber(ARGV[5])

local complaint = ''
-- A failure to register the replica must not cost it its proof.
local function try(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    complaint = answer.err
    return nil
  end
  return answer
end

local heads = {}
for i = 1, #KEYS, 3 do
  local presence, has_presence = ARGV[6 + (i + 2) / 3], 1
  if presence == '' then
    has_presence = redis.call('PEXPIRE', KEYS[i + 1], ARGV[5])
  else
    redis.call('SET', KEYS[i + 1], presence, 'PX', ARGV[5])
  end
  local head = redis.pcall('HMGET', KEYS[i], 'epoch', 'seq', 'digest', 'digest_seq', 'lease_ms')
  if head.err and not head.err:find('WRONGTYPE') then
    return redis.error_reply(head.err)
  end
  local epoch, seq = head[1], head[2]
  -- A value that another program wrote, and that is no position in a log, is not a head.
  if not (epoch and epoch:match('^[%w._-]+$') and seq and seq:match('^%d+$') and tonumber(seq) < 2 ^ 53 - 1) then
    if head.err or epoch then
      redis.call('DEL', KEYS[i])
    end
    redis.call('HSET', KEYS[i], 'epoch', ARGV[6], 'seq', 0, 'digest', '', 'digest_seq', 0)
    head = {ARGV[6], '0', '', '0'}
  end
  if lifetime_ms > (tonumber(head[5] or 0) or 0) then
    try('HSET', KEYS[i], 'lease_ms', ARGV[5])
  end
  for field = 1, 4 do
    heads[#heads + 1] = head[field]
  end
  heads[#heads + 1] = has_presence
end
redis.call(ARGV[3], ARGV[1], ARGV[2])

local time = try('TIME')
if time then
  local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 3, #KEYS, 3 do
    local added = try('ZADD', KEYS[i], string.format('%.0f', now_ms + lifetime_ms), replica)
    if added == 1 then
      local since = try('ZRANGEBYSCORE', KEYS[i], string.format('%.0f', NEVER_MS), '+inf', 'LIMIT', 0, 1)
      if since and #since == 0 then
        try('ZADD', KEYS[i], string.format('%.0f', NEVER_MS), string.format(' since=%.0f', now_ms))
      end
    end
    -- A few at a time: each echo adds one at most, so expired members do not accumulate.
    local expired = try('ZRANGEBYSCORE', KEYS[i], '-inf', string.format('%.0f', now_ms), 'LIMIT', 0, EXPIRED_MAX)
    if expired and #expired > 0 then
      try('ZREM', KEYS[i], unpack(expired))
    end
    try('PEXPIRE', KEYS[i], DAY_MS)
  end
end

-- A user without the right to INFO gets no replication id; its replicas then clear with each new subscription.
local info = redis.pcall('INFO', 'replication')
local answer = {type(info) == 'string' and info:match('master_replid:(%x+)') or '', complaint}
for i = 1, #heads do
  answer[#answer + 1] = heads[i]
end
return answer
