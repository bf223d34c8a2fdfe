-- In a database other than 0, comes before append.lua and echo.lua: no replica of this version may prove a head that
-- older publishers pass by, and no replica of an older version one that this version passes by.
--
-- Older versions use the names of database 0 in every database. Where they have written a head:
-- - While their replicas are registered and this version has no head yet, this version is refused.
-- - Otherwise their head and log are sealed, with values that they refuse: their publishes fail, and their replicas
--   bypass their caches. This version begins a new log, so that its replicas drop everything: they have not received
--   what older publishers wrote until now.
--
-- KEYS  as in append.lua and echo.lua: each third is a head

do
  -- A sequence of more digits than Python reads, and a digest that is no UTF-8: either is an error for older replicas.
  local EPOCH, SEQ, DIGEST = 'sealed-by-a-newer-version', ('0'):rep(5000), '\255'
  for i = 1, #KEYS, 3 do
    local head = KEYS[i]
    local older_head = head:gsub('@%d+', '', 1)
    local older = redis.pcall('HMGET', older_head, 'epoch', 'seq', 'digest')
    if older.err then
      -- A key of another type is not a head: older publishers would replace it.
      if not older.err:find('WRONGTYPE') then
        return redis.error_reply(older.err)
      end
    elseif older[1] and not (older[1] == EPOCH and older[2] == SEQ and older[3] == DIGEST) then
      local begin = head:sub(1, -5)
      local older_begin = older_head:sub(1, -5)
      if not redis.call('HMGET', head, 'epoch')[1] then
        local time = redis.pcall('TIME')
        local now = time.err and 0 or time[1] * 1000 + math.floor(time[2] / 1000)
        local members = time.err and time or redis.pcall('ZRANGEBYSCORE', older_begin .. 'replicas',
                                                         string.format('(%.0f', now), '(9e15', 'LIMIT', 0, 5)
        local whose = head:match('@(%d+)')
        if members.err and not members.err:find('WRONGTYPE') then
          return redis.error_reply('OLDER an older version has used database ' .. whose .. ', and this user may not ' ..
                                   'check whether its replicas still run: start a replica of this version, or grant ' ..
                                   '+time +zrangebyscore. ' .. members.err)
        end
        local named = {}
        for _, member in ipairs(members) do
          if member:sub(1, 1) ~= ' ' then
            named[#named + 1] = member
          end
        end
        if #named > 0 then
          return redis.error_reply('OLDER an older version uses database ' .. whose .. ': its replicas ' ..
                                   table.concat(named, ', ') .. ' are registered; stop every replica and publisher ' ..
                                   'of it, and this version takes the database over')
        end
      end
      -- In this order: what was written before a refusal only costs loads.
      redis.call('DEL', head, begin .. 'log')
      redis.call('HSET', older_head, 'epoch', EPOCH, 'seq', SEQ, 'digest', DIGEST, 'digest_seq', SEQ)
      redis.call('DEL', older_begin .. 'log')
      -- No entry can follow this one. Without the right to XADD, which replicas need not have, older publishes succeed;
      -- they replace the sealed head, and the next echo of this version begins a new log.
      redis.pcall('XADD', older_begin .. 'log', '18446744073709551615-18446744073709551615', 'f', 'sealed')
    end
  end
end

